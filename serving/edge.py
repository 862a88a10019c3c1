"""The outermost layer of the gateway: says who asks, bounds and times each request, and catches what nobody expected.

In this order: a gateway that is being stopped begins nothing; the key (serving.access) and its rate; the body, its size and pace.
Plain ASGI, so that streams pass through unbuffered and a client's leaving is seen below. Routes are counted by template.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitoring.metrics import HTTP_REQUEST_DURATION, HTTP_REQUESTS, HTTP_REQUESTS_IN_FLIGHT, bounded
from pipelines.errors import LabError
from serving import record
from serving.access import Access
from serving.drain import Drain
from serving.logs import write_request
from serving.problems import BodySlow, BodyTooLarge, event, response, unexpected
from serving.settings import ConnectionBounds
from serving.traces import Traces
from serving.visit import VISIT, Visit

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNMATCHED = "unmatched"
CLIENT_CLOSED = 499  # nginx's status for a client that left before the answer


class Edge:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        limit_of: returns how long the body of a request may be, or raises why nothing of it is read.
        access: who may ask.
        drain: whether the gateway is being stopped.
        bounds: how slowly a body may come.
        traces: takes the spans of each request; None for none.
        prompts: whether what users ask goes into the log.
    """

    def __init__(
        self, app: ASGIApp, limit_of: Callable[[Scope], int], access: Access, drain: Drain, bounds: ConnectionBounds,
        traces: Traces | None = None, prompts: bool = False,
    ) -> None:  # fmt: skip
        self.app, self.limit_of = app, limit_of
        self.access, self.drain, self.bounds = access, drain, bounds
        self.traces, self.prompts = traces, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen: dict[str, Any] = {}
        own = record.begin(scope, self.traces, prompts=self.prompts)

        async def remember(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                seen["stream"] = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
                message["headers"] = [*message.get("headers", ()), (record.HEADER, own.id.encode())]
            await send(message)
            own.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        began, visit = time.perf_counter(), Visit(self.access)
        VISIT.set(visit)  # each request has a task of its own, so nobody else sees it
        HTTP_REQUESTS_IN_FLIGHT.inc()
        try:
            await self._answer(visit, scope, receive, remember, seen)
        except asyncio.CancelledError:
            if not self.drain.over:
                raise
            await self._cut(scope, receive, remember, seen)
        finally:
            visit.leave()
            HTTP_REQUESTS_IN_FLIGHT.dec()
            status, seconds = seen.get("status", CLIENT_CLOSED), time.perf_counter() - began
            _count(scope, status, seconds)
            own.end(_template(scope), status)
            write_request(own, _template(scope), status, seconds)

    async def _answer(self, visit: Visit, scope: Scope, receive: Receive, send: Send, seen: dict[str, Any]) -> None:
        try:
            self.drain.check(scope["path"])
            visit.key = self.access.identify(scope)
            if visit.key:
                self.access.rates.take_request(visit.key)
            with self.drain.answering():
                body = await self._read(receive, self.limit_of(scope), _content_length(scope))
                if body is not None:
                    await self.app(scope, _replay(body, receive), send)
        except LabError as error:  # the body is not wanted
            await response(error, scope["path"])(scope, receive, send)
        except Exception as error:  # the last line: whatever it is, the client gets an id and the log the traceback
            problem = unexpected(error)
            if "status" not in seen:
                await response(problem, scope["path"])(scope, receive, send)

    async def _cut(self, scope: Scope, receive: Receive, send: Send, seen: dict[str, Any]) -> None:
        """End an answer whose time is over with an error that the client can read."""
        error = self.drain.cut()
        if "status" not in seen:
            await response(error, scope["path"])(scope, receive, send)
        elif seen["stream"]:
            await send({"type": "http.response.body", "body": event(error, scope["path"])})

    async def _read(self, receive: Receive, limit: int, announced: int) -> bytes | None:
        """Return the whole body, or None if the client left; `BodyTooLarge` over the limit, `BodySlow` behind the pace."""
        body: list[bytes] = []
        size, began = announced, time.monotonic()
        while True:
            if size > limit:
                raise BodyTooLarge(
                    f"the request body has {'at least ' if not announced else ''}{size} bytes", f"at most {limit} bytes"
                )
            came = sum(map(len, body))
            try:
                async with asyncio.timeout(self._pace(came) - (time.monotonic() - began)):
                    message = await receive()
            except TimeoutError:
                raise BodySlow(f"{came} bytes of the request body came in {self._pace(came):.0f} s", "the whole of it") from None
            if message["type"] == "http.disconnect":
                return None
            body.append(message.get("body", b""))
            size = max(announced, sum(map(len, body)))
            if not message.get("more_body", False) and size <= limit:
                return b"".join(body)

    def _pace(self, came: int) -> float:
        """Return within how many seconds of the head the next piece has to come."""
        return self.bounds.body_seconds + came / self.bounds.body_bytes_per_second


def _content_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once and then whatever the connection says."""
    unread = [body]

    async def again() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return again


def _template(scope: Scope) -> str:
    route: Any = scope.get("route")
    return str(getattr(route, "path", UNMATCHED))


def _count(scope: Scope, status: int, seconds: float) -> None:
    template = _template(scope)
    method = bounded(scope["method"], METHODS)
    HTTP_REQUESTS.labels(route=template, method=method, status=str(status)).inc()
    HTTP_REQUEST_DURATION.labels(route=template).observe(seconds)
