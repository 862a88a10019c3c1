"""The engine, as requests see it: an OpenAI chat request in, one completion or a stream of chunks out.

Connections are aiohttp's below httpx's interface: httpx's own take about twice the time for each token.

Every failure leaves here as one of the errors in `serving.problems`, and every generation is counted. A stream that is
closed early closes the connection to the engine, which then stops generating.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from monitoring.metrics import GENERATED_TOKENS, GENERATION_DURATION, GENERATION_REQUESTS, GENERATION_TTFT, PROMPT_TOKENS
from serving.engines.contract import Chat, Engine, Launch
from serving.problems import BadRequest, EngineDown, EngineSilent, from_engine
from serving.supervisor import Supervisor

if TYPE_CHECKING:
    import httpx

CHAT_PATH = "/v1/chat/completions"
DONE = "[DONE]"
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0  # a connection is kept for the next request; llama.cpp closes it after 5

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


class Meter:
    """Measures one generation: `async with` it, show it each chunk or the whole completion.

    The time to first token is measured on streams only: a completion in one piece does not show when it began.
    """

    def __init__(self, model: str) -> None:
        self.model, self.began = model, time.perf_counter()
        self.first_token: float | None = None
        self.usage: dict[str, int] = {}

    def see(self, event: Mapping[str, Any]) -> None:
        """Take the first token's time and the token counts from a chunk or completion."""
        if event.get("usage"):
            self.usage = {
                key: int(event["usage"].get(key) or 0) for key in ("prompt_tokens", "completion_tokens", "total_tokens")
            }
        if self.first_token is None and event.get("object") == "chat.completion.chunk" and _has_token(event):
            self.first_token = time.perf_counter()
            GENERATION_TTFT.labels(model=self.model).observe(self.first_token - self.began)

    async def __aenter__(self) -> Meter:
        """Start measuring."""
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Count the generation by how it ended."""
        GENERATION_REQUESTS.labels(model=self.model, outcome=_outcome(kind)).inc()
        PROMPT_TOKENS.labels(model=self.model).inc(self.usage.get("prompt_tokens", 0))
        GENERATED_TOKENS.labels(model=self.model).inc(self.usage.get("completion_tokens", 0))
        if kind is None:
            GENERATION_DURATION.labels(model=self.model).observe(time.perf_counter() - self.began)


class Upstream:
    """Sends requests to the engine over one pool of connections; `async with` it while the gateway runs."""

    def __init__(self, engine: Engine, launch: Launch, supervisor: Supervisor, silence_seconds: float) -> None:
        self.engine, self.launch, self.supervisor = engine, launch, supervisor
        self.silence_seconds = silence_seconds
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Upstream:
        """Open the pool."""
        import httpx
        from aiohttp import ClientSession, TCPConnector
        from httpx_aiohttp import AiohttpTransport

        timeout = httpx.Timeout(self.silence_seconds, connect=CONNECT_SECONDS)
        pool = TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)  # 0: as many connections as there are requests
        transport = AiohttpTransport(client=ClientSession(connector=pool), trust_env=False)
        self._client = httpx.AsyncClient(base_url=self.launch.url, timeout=timeout, transport=transport, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the pool."""
        if self._client:
            await self._client.aclose()

    def check_up(self) -> None:
        """Raise `EngineDown`, with the reason and when to ask again, unless the engine runs."""
        status = self.supervisor.status
        if not status.up:
            raise EngineDown(status.reason, status.retry_after_seconds)

    async def healthy(self) -> bool:
        """Ask the engine itself whether it is well."""
        import httpx

        assert self._client is not None
        try:
            return (await self._client.get(self.engine.health_path, timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return one completion."""
        async with Meter(body["model"]) as meter, self._sent(body) as reply:
            completion: dict[str, Any] = json.loads(await reply.aread())
            meter.see(completion)
            return completion | {"model": body["model"]}  # llama.cpp names the base whatever answered

    async def stream(self, body: Mapping[str, Any], meter: Meter) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed completion; the last one carries `usage` and no choices."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with meter, self._sent(asked) as reply:
            async for line in reply.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == DONE:
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise self._refusal(500, event["error"])
                    meter.see(event)
                    yield event | {"model": body["model"]}
            raise self._lost("before the end of its reply")

    async def token_count(self, chat: Chat) -> int:
        """Return the length of a chat as the engine reads it, in tokens, up to where the reply begins."""
        import httpx
        from starlette.concurrency import run_in_threadpool

        def count() -> int:
            with httpx.Client(timeout=self.silence_seconds, trust_env=False) as client:
                return len(self.engine.render(client, self.launch, chat))

        self.check_up()
        try:
            return await run_in_threadpool(count)
        except httpx.TimeoutException:
            raise self._silent() from None
        except httpx.HTTPStatusError as error:
            raise self._refusal(error.response.status_code, _error_object(error.response.content)) from None
        except httpx.HTTPError as error:
            raise self._lost(f"({type(error).__name__})") from None

    @asynccontextmanager
    async def _sent(self, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """Send a request; the block gets an answer with status 200."""
        import httpx

        self.check_up()
        assert self._client is not None
        content = _encode(self.engine.select(body, self.launch))
        try:
            async with self._client.stream(
                "POST", CHAT_PATH, content=content, headers={"Content-Type": "application/json"}
            ) as reply:
                if reply.status_code != 200:
                    raise self._refusal(reply.status_code, _error_object(await reply.aread()))
                yield reply
        except httpx.ReadTimeout:
            raise self._silent() from None
        except httpx.HTTPError as error:  # the transport tells a closed connection as httpx.ConnectTimeout
            raise self._lost(f"({type(error).__name__})") from None

    def _silent(self) -> EngineSilent:
        return EngineSilent(f"the engine was silent for {self.silence_seconds:g} s", "an answer",
                            "a shorter request, or serve with more request_seconds")  # fmt: skip

    def _refusal(self, status: int, error: Mapping[str, Any]) -> Exception:
        return from_engine(status, error, self.engine.overflow(error))

    def _lost(self, how: str) -> EngineDown:
        status = self.supervisor.status
        reason = "" if status.up else f": {status.reason}"
        return EngineDown(f"the connection to the engine was lost {how}{reason}", status.retry_after_seconds)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it if the client leaves first.

    Raises:
        ClientGone: the client left.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def text_of(event: Mapping[str, Any]) -> str:
    """Return the text that a chunk adds; empty for a chunk that adds none."""
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ()))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _has_token(event: Mapping[str, Any]) -> bool:
    deltas = [choice.get("delta", {}) for choice in event.get("choices", ())]
    return any(delta.get(key) for delta in deltas for key in ("content", "reasoning_content", "tool_calls"))


def _outcome(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "ok"
    if issubclass(kind, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return "refused" if issubclass(kind, BadRequest) else "error"


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, or a lone surrogate
        raise BadRequest(f"the request is not valid JSON: {error}", "finite numbers and valid Unicode") from None


def _error_object(content: bytes) -> Mapping[str, Any]:
    """Return the error object of an answer, whatever form it has."""
    try:
        body = json.loads(content)
    except ValueError:
        return {"message": content.decode("utf-8", "replace")[:500]}
    error = body.get("error", body) if isinstance(body, dict) else {"message": str(body)[:500]}
    return error if isinstance(error, dict) else {"message": str(error)}
