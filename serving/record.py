"""What is known about the request that is being answered: its id, and the facts that its log line and its spans tell.

One record for each request, reachable from all code that works for it (a context variable). Outside of a request there is one
that keeps nothing, so nobody has to ask. It holds no prompt unless the log is to have them (configs/serve, `log.prompts`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.types import Scope

from serving.traces import NO_SPAN, Span, Traces

HEADER = b"x-request-id"
WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Record:
    """One request.

    Args:
        id: of the request.
        method: of HTTP.
        span: of the request, on which the others hang.
        prompts: whether to keep what was asked.

    Attributes:
        facts: for the log.
        complete: True once the last byte of the answer was sent.
    """

    def __init__(self, id: str, method: str, span: Span, *, prompts: bool) -> None:
        self.id, self.method, self.prompts, self.complete = id, method, prompts, False
        self.facts: dict[str, Any] = {}
        self.span = self._inner = span

    @contextmanager
    def retrieval(self, index: str) -> Iterator[Span]:
        """Trace a search of an index."""
        span = self.span.child(f"retrieval {index}", {"gen_ai.operation.name": "retrieval", "gen_ai.data_source.id": index})
        error: BaseException | None = None
        try:
            yield span
        except BaseException as problem:
            error = problem
            raise
        finally:
            span.end(error)

    def end(self, route: str, status: int) -> None:
        """End the span of the request."""
        self.span.rename(f"{self.method} {route}")
        self.span.set("http.route", route)
        self.span.set("http.response.status_code", status)
        self.span.end(str(status) if status >= 500 else None)

    def begin_generation(self, model: str, operation: str) -> None:
        """Begin a generation; `operation` is OpenTelemetry's name of what is done: chat or text_completion."""
        self.facts["model"] = model
        told = {"gen_ai.operation.name": operation, "gen_ai.request.model": model}
        self._inner = self.span.child(f"{operation} {model}", told, out=True)

    def asked(self, body: Mapping[str, Any]) -> dict[str, str]:
        """Take what the engine is asked, and return the headers that let it go on with the trace."""
        if self.prompts:
            self.facts["prompt"] = body.get("messages", body.get("prompt"))
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            if isinstance(body.get(name), int | float):
                self._inner.set(f"gen_ai.request.{name}", body[name])
        return self._inner.headers()

    def end_generation(
        self, usage: Mapping[str, int], finish_reasons: Sequence[str], ttft_seconds: float | None, error: BaseException | None
    ) -> None:
        """Take how a generation went."""
        tokens: dict[str, Any] = {"input_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}
        self.facts |= {**tokens, "ttft_seconds": ttft_seconds, "finish_reason": ",".join(finish_reasons) or None}
        told = {f"gen_ai.usage.{name}": count for name, count in tokens.items()}
        told |= {"gen_ai.response.finish_reasons": list(finish_reasons) or None,
                 "gen_ai.response.time_to_first_chunk": ttft_seconds}  # fmt: skip
        for name, value in told.items():
            self._inner.set(name, value)
        self._inner.end(error)
        self._inner = self.span


_NOBODYS = Record("", "", NO_SPAN, prompts=False)
_CURRENT: ContextVar[Record] = ContextVar("request", default=_NOBODYS)


def begin(scope: Scope, traces: Traces | None, *, prompts: bool) -> Record:
    """Return the record of a new request, which is the current one from now on."""
    headers = dict(scope["headers"])
    sent = headers.get(HEADER, b"").decode("latin-1")
    id = sent if WELL_FORMED.fullmatch(sent) else secrets.token_hex(8)
    method = scope["method"][:16]
    own = Record(id, method, traces.request(method, headers, id) if traces else NO_SPAN, prompts=prompts)
    _CURRENT.set(own)
    return own


def current() -> Record:
    """Return the record of the request that this code works for; one that nobody reads if there is none."""
    found = _CURRENT.get()
    return found if found is not _NOBODYS else Record("", "", NO_SPAN, prompts=False)


def id_field() -> dict[str, str]:
    """Return the id of the current request as a field of an answer; empty outside of one."""
    own = _CURRENT.get().id
    return {"request_id": own} if own else {}
