"""OpenAI's chat API in front of one LangChain chat model: requests in, completions and streams with their usage out.

It passes on what every provider has (messages, temperature, top_p, max_tokens, stop) and refuses the rest by name. It checks
no limits; the gateway does. `python -m serving.engines.provider` runs it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipelines.errors import LabError
from serving.leaving import ClientGone, EventStream, WhilePresent
from serving.problems import EngineRefused, clean
from serving.upstream import CHAT_PATH, DONE

CLIENT_FIELDS = ("temperature", "top_p", "max_tokens")  # in LangChain part of the model, not of a request
PASSED = {"model", "messages", "stream", "stream_options", "stop", "n", *CLIENT_FIELDS}
TOO_LONG = ("length", "max_tokens", "MAX_TOKENS")  # how providers say that a reply was cut
RETRY_SECONDS = 5
SOME_CLIENTS = 64


class Failure(NamedTuple):
    """What the provider's refusal becomes: a status, words, and when to ask again."""

    status: int
    message: str
    retry_after_seconds: int | None = None


class RemoteModel:
    """One model of a provider, and at most `slots` requests under way to it.

    Args:
        name: provider:model, as `init_chat_model` takes it.
        base_url: another address of the same API, or None.
        timeout_seconds: longest silence of the provider.
        slots: requests under way at once.
        key: the environment variable that holds the key, for errors; empty if there is not just one.
    """

    def __init__(self, name: str, base_url: str | None, timeout_seconds: float, slots: int, key: str) -> None:
        self.name, self.base_url, self.timeout_seconds, self.key = name, base_url, timeout_seconds, key
        self.slots = asyncio.Semaphore(slots)
        self._made = lru_cache(SOME_CLIENTS)(self._make)

    def client(self, **options: float | None) -> Any:
        """Return LangChain's chat model with these options; connections are shared."""
        return self._made(tuple(sorted((key, value) for key, value in options.items() if value is not None)))

    def _make(self, options: tuple[tuple[str, Any], ...]) -> Any:
        from langchain.chat_models import init_chat_model

        fixed: dict[str, Any] = {"base_url": self.base_url} if self.base_url else {}
        if self.name.startswith("openai:"):  # the gateway's clients retry, and each stream is counted
            fixed |= {"timeout": self.timeout_seconds, "max_retries": 0, "stream_usage": True}
        return init_chat_model(self.name, **fixed, **dict(options))

    async def chunks(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a reply in OpenAI's form: text, the reason why it ended, then the usage."""
        from langchain_core.messages.utils import convert_to_messages

        client = self.client(**{field: body.get(field) for field in CLIENT_FIELDS})
        usage, reason = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0), "stop"
        async with self.slots, aclosing(client.astream(convert_to_messages(body["messages"]), stop=_stop(body))) as stream:
            async for piece in stream:
                reason = _reason(piece.response_metadata) or reason
                usage = {key: usage[key] + (piece.usage_metadata or {}).get(key, 0) for key in usage}
                if piece.text:
                    yield self._chunk({"content": str(piece.text)}, None)
        yield self._chunk({}, reason)
        yield self._chunk(None, None) | {"usage": {"prompt_tokens": usage["input_tokens"],
            "completion_tokens": usage["output_tokens"], "total_tokens": usage["total_tokens"]}}  # fmt: skip

    def _chunk(self, delta: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        return {"id": "chatcmpl-provider", "object": "chat.completion.chunk", "created": int(time.time()), "model": self.name,
                "choices": choices}  # fmt: skip

    def failure(self, error: Exception) -> Failure:
        """Translate what the provider's client raised; only a refused request is told in the provider's words."""
        status, kind = _status(error), type(error).__name__
        if isinstance(error, LabError):
            return Failure(400, f"{error.came}; expected: {error.expected}")
        if status in (401, 403):
            return Failure(502, f"the provider refused the key ({status}); set {self.key or 'its key'} in the environment of the "
                                "server, and start it again")  # fmt: skip
        if status == 404:
            return Failure(502, f"the provider has no {self.name}; see provider.model and provider.base_url")
        if status == 429:
            return Failure(429, "the provider's limit of requests or tokens is reached", _retry_after(error))
        if status is not None and 400 <= status < 500:
            return Failure(400, clean(f"the provider refused the request: {error}")[:500])
        if status is None and "Timeout" in kind:
            return Failure(504, f"the provider was silent for {self.timeout_seconds:g} s")
        return Failure(502, f"the provider answered {status}" if status else f"the provider could not be asked ({kind})")


def create_app(model: RemoteModel) -> Starlette:
    """Return the application that passes chats on to a remote model."""

    async def chat(request: Request) -> Response:
        try:
            body = _checked(await request.json())
            if not body.get("stream"):
                with WhilePresent(request.receive):
                    return JSONResponse(await _whole(model, body))
            chunks = model.chunks(body)
            with WhilePresent(request.receive):
                first = await anext(chunks)  # an error of the provider comes out here, while there is still a status to send
        except ClientGone:
            return Response(status_code=499)
        except Exception as error:  # each provider's client has errors of its own
            failure = model.failure(error)
            return JSONResponse({"error": _error(failure)}, failure.status)
        return EventStream(_events(model, first, chunks))

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route(CHAT_PATH, chat, methods=["POST"]), Route("/health", health)])


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request; `EngineRefused` names what cannot be passed on to every provider."""
    asked = {key for key, value in body.items() if value is not None}
    extra = sorted(asked - PASSED) + (["n"] if body.get("n") not in (None, 1) else [])
    if extra:
        raise EngineRefused(f"the provider engine does not pass on {', '.join(extra)[:200]}", f"of {', '.join(sorted(PASSED))}")
    return body


async def _whole(model: RemoteModel, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply in one piece."""
    chunks = [chunk async for chunk in model.chunks(body)]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    reason = chunks[-2]["choices"][0]["finish_reason"]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return chunks[-1] | {"object": "chat.completion", "choices": [choice]}


async def _events(model: RemoteModel, first: dict[str, Any], chunks: Any) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(chunks):
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:  # the status is sent already: the stream itself must say it
        yield _event({"error": _error(model.failure(error))})
        return
    yield b"data: " + DONE + b"\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _error(failure: Failure) -> dict[str, Any]:
    return {"message": failure.message, "type": "provider_error", "retry_after_seconds": failure.retry_after_seconds}


def _stop(body: Mapping[str, Any]) -> list[str] | None:
    stop = body.get("stop")
    return [stop] if isinstance(stop, str) else stop


def _reason(metadata: Mapping[str, Any]) -> str | None:
    """Return why a reply ended in OpenAI's words, None for a piece that does not say it."""
    said = metadata.get("finish_reason") or metadata.get("stop_reason") or metadata.get("stopReason")
    return None if said is None else "length" if said in TOO_LONG else "stop"


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an error of a provider's client carries, wherever it does; None if it has none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: Exception) -> int:
    value = str(getattr(getattr(error, "response", None), "headers", {}).get("retry-after", ""))
    return int(value) if value.isdigit() else RETRY_SECONDS
