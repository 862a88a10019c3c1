"""The gateway's own errors, and the two forms in which every error leaves it: OpenAI's, and ours.

No form carries a traceback. An error that is not ours becomes a 500 with an id, under which the log has the traceback.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from pipelines.errors import EngineError, LabError, UnknownName
from serving import record
from serving.engines.contract import Overflow

LOG = logging.getLogger("serving")
OPENAI_PATHS = "/v1/"  # but for ours, below
LAB_PATHS = ("/v1/rag",)
DOCUMENT_PATHS = ("/v1/documents", "/v1/adapters")  # OpenAI's form, and the status that says most
_TYPES = ("str", "int", "float", "bool")


class OpenAIError(BaseModel):
    """What OpenAI's clients read of an error; `param` is the field of the request that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    """An error in OpenAI's form."""

    error: OpenAIError


OPENAI_PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": {"model": OpenAIProblem}, "5XX": {"model": OpenAIProblem}}


class LabProblem(BaseModel):
    """An error in our form: `message`, `type`, `expected` and `next`, the command that leads on."""

    error: dict[str, str]


class BadRequest(LabError):
    """A request has the wrong form or a value outside its limits.

    Args:
        came, expected, next_command: as of every `LabError`.
        param: the field that is wrong, as "messages[0].content", or None.
    """

    http_status = 422

    def __init__(self, came: str, expected: str = "", next_command: str = "", param: str | None = None) -> None:
        super().__init__(came, expected, next_command)
        self.param = param


class UnknownField(BadRequest):
    """A request has a field that is not in the API."""


class Unsupported(BadRequest):
    """A request asks for what the engine, with the model that it holds, cannot do."""


class UnknownModel(UnknownName, BadRequest):
    """No served model has that name."""

    http_status = 404


class BodyTooLarge(BadRequest):
    """The request body is larger than the gateway reads."""

    http_status = 413


class BodySlow(BadRequest):
    """The request body does not come, or too slowly."""

    http_status = 408


class ContentFiltered(BadRequest):
    """A guard blocks what was sent; the message names the guard and the kind, never the text."""

    http_status = 400


class AdminOff(LabError):
    """Changes are not turned on."""

    http_status = 403


class ManyWorkers(LabError):
    """What is served cannot be changed over the API while several workers serve it."""

    http_status = 501


class NotAdmin(LabError):
    """The request needs an admin's key and carries a user's."""

    http_status = 403


class KeyWrong(LabError):
    """A request carries no key where one is needed, or a wrong one."""

    http_status = 401


class AccessBroken(LabError):
    """Nobody can be let in, since the file of keys cannot be used."""

    http_status = 503


class Refused(LabError):
    """There is no room for a request now; it is worth asking again in `retry_after_seconds`.

    Args:
        came: what there is no room for.
        kind: "requests" or "tokens", as in OpenAI's errors.
        seconds: after which there is room again.
    """

    http_status = 429

    def __init__(self, came: str, kind: str, seconds: float) -> None:
        self.kind, self.retry_after_seconds = kind, max(1, math.ceil(seconds))
        super().__init__(came, "fewer at a time", f"ask again in {self.retry_after_seconds} s")


class RateLimited(Refused):
    """A key has used up what it may use."""


class Overloaded(Refused):
    """All places are taken, whoever asks."""


class Stopping(LabError):
    """The gateway is being stopped and begins nothing new; gone in `retry_after_seconds`."""

    http_status = 503

    def __init__(self, came: str, seconds: float) -> None:
        self.retry_after_seconds = max(1, math.ceil(seconds))
        super().__init__(came, "a gateway that runs", f"ask again in {self.retry_after_seconds} s")


class ContextExceeded(BadRequest):
    """The prompt does not fit into the context."""

    def __init__(self, sizes: Overflow) -> None:
        prompt = f"{sizes.prompt_tokens} tokens" if sizes.prompt_tokens else "more tokens than fit"
        came = f"the prompt has {prompt}, the context holds {sizes.context_tokens}"
        super().__init__(came, "prompt and reply within the context", "ask less, lower k, or serve with more context_tokens")


class EngineRefused(BadRequest):
    """The engine found the request wrong."""

    http_status = 400


class EngineDown(EngineError):
    """The engine is not running; it is worth asking again in `retry_after_seconds`."""

    def __init__(self, reason: str, retry_after_seconds: int) -> None:
        self.retry_after_seconds = max(1, math.ceil(retry_after_seconds))
        super().__init__(
            reason, "a running engine", f"ask again in {self.retry_after_seconds} s; GET /readyz says when it is back"
        )


class EngineFailed(EngineError):
    """The engine answered a request with an error of its own."""

    http_status = 502


class ProviderBusy(EngineError):
    """A remote model takes no more requests; it is worth asking again in `retry_after_seconds`."""

    http_status = 429

    def __init__(self, reason: str, retry_after_seconds: int) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(reason, "fewer requests", f"ask again in {retry_after_seconds} s")


class EngineSilent(EngineError):
    """The engine took longer than the request may take."""

    http_status = 504


def clean(text: str) -> str:
    """Return the text without lone surrogates, which no JSON answer can carry, and not longer than a message should be."""
    return text.encode("utf-8", "replace").decode()[:2000]


def field_name(place: Sequence[str | int]) -> str | None:
    """Return a place in a request, as validation gives it, in OpenAI's form: "messages[0].content"; None for the whole."""
    name = ""
    for part in place:
        if isinstance(part, str) and (part in _TYPES or not part.isidentifier() or part[0].isupper()):
            break  # one of several types that the value could have had
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")[:120] or None


def lab_body(error: LabError) -> dict[str, Any]:
    """Return an error in our form."""
    return {"error": {"message": clean(error.came), "type": type(error).__name__, "expected": clean(error.expected),
                      "next": clean(error.next_command)}, **record.id_field()}  # fmt: skip


def openai_body(error: LabError) -> dict[str, Any]:
    """Return an error in OpenAI's form; what to do is part of the message."""
    status = openai_status(error)
    kind = error.kind if isinstance(error, Refused) else "invalid_request_error" if status < 500 else "server_error"
    parts = [error.came, error.expected and f"expected: {error.expected}", error.next_command]
    message, param = clean("; ".join(p for p in parts if p)), getattr(error, "param", None)
    content = {"message": message, "type": kind, "param": clean(param) if param else None, "code": _code(error)}
    return {"error": content, **record.id_field()}


def openai_status(error: LabError) -> int:
    """Return the HTTP status; OpenAI's API says 400 where others say 422."""
    return 400 if error.http_status == 422 else error.http_status


def response(error: LabError, path: str) -> JSONResponse:
    """Return the answer for an error, in the form of the API that the path belongs to."""
    headers = _headers(error)
    if path.startswith(DOCUMENT_PATHS):
        return JSONResponse(openai_body(error), error.http_status, headers)
    if path.startswith(OPENAI_PATHS) and not path.startswith(LAB_PATHS):
        return JSONResponse(openai_body(error), openai_status(error), headers)
    return JSONResponse(lab_body(error), error.http_status, headers)


def event(error: LabError, path: str) -> bytes:
    """Return an error as the server-sent event that ends a stream of the API that the path belongs to."""
    if path.startswith(OPENAI_PATHS):
        return f"data: {json.dumps(openai_body(error), ensure_ascii=False)}\n\n".encode()
    return f"event: error\ndata: {json.dumps(lab_body(error), ensure_ascii=False)}\n\n".encode()


def _headers(error: LabError) -> dict[str, str]:
    """Return what an error says beside its body; a connection is not kept where the rest of a body is still to come."""
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, KeyWrong) else {}
    if isinstance(error, EngineDown | ProviderBusy | Refused | Stopping):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Stopping | BodySlow):
        headers["Connection"] = "close"
    return headers


def unexpected(error: Exception) -> LabError:
    """Log an error that nobody expected and return one that says only its id: the request's, if there is one."""
    number = record.id_field().get("request_id") or secrets.token_hex(4)
    LOG.error("unexpected error %s", number, exc_info=error)
    return LabError(f"unexpected error {number}", "no error", f"look for {number} in the gateway's log")


def from_engine(status: int, error: Mapping[str, Any], overflow: Overflow | None) -> LabError:
    """Return our error for an error answer of the engine."""
    if overflow:
        return ContextExceeded(overflow)
    message = str(error.get("message", "no message"))
    if status == 429:
        return ProviderBusy(message, int(error.get("retry_after_seconds") or 1))
    if 400 <= status < 500:
        return EngineRefused(message, param=param if isinstance(param := error.get("param"), str) else None)
    return EngineFailed(f"the engine answered {status}: {message}", "an answer", "GET /readyz")


def _code(error: LabError) -> str | None:
    codes: dict[type[LabError], str] = {
        ContextExceeded: "context_length_exceeded", UnknownName: "model_not_found", EngineDown: "engine_unavailable",
        EngineFailed: "engine_failed", EngineSilent: "timeout", BodyTooLarge: "request_too_large",
        BadRequest: "invalid_value", UnknownField: "unknown_parameter", Unsupported: "unsupported_value",
        UnknownModel: "model_not_found", EngineRefused: "invalid_value", AdminOff: "admin_off", KeyWrong: "invalid_api_key",
        BodySlow: "request_timeout", NotAdmin: "admin_key_needed", AccessBroken: "keys_unusable",
        RateLimited: "rate_limit_exceeded", Overloaded: "server_overloaded", Stopping: "server_stopping",
        ContentFiltered: "content_filter", ProviderBusy: "rate_limit_exceeded",
    }  # fmt: skip
    return codes.get(type(error))
