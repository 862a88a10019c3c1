"""The outermost layer of the gateway: counts and times each request, bounds its body, and catches what nobody expected.

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
from serving.logs import write_request
from serving.problems import BodyTooLarge, response, unexpected
from serving.traces import Traces

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNMATCHED = "unmatched"
CLIENT_CLOSED = 499  # nginx's status for a client that left before the answer


class Edge:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        limit_of: returns how long the body of a request may be, or raises why nothing of it is read.
        traces: takes the spans of each request; None for none.
        prompts: whether what users ask goes into the log.
    """

    def __init__(
        self, app: ASGIApp, limit_of: Callable[[Scope], int], traces: Traces | None = None, prompts: bool = False
    ) -> None:
        self.app, self.limit_of, self.traces, self.prompts = app, limit_of, traces, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen: dict[str, int] = {}
        own = record.begin(scope, self.traces, prompts=self.prompts)

        async def remember(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (record.HEADER, own.id.encode())]
            await send(message)
            own.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        began = time.perf_counter()
        HTTP_REQUESTS_IN_FLIGHT.inc()
        try:
            await self._answer(scope, receive, remember, seen)
        except asyncio.CancelledError:
            seen.setdefault("status", CLIENT_CLOSED)
            raise
        finally:
            HTTP_REQUESTS_IN_FLIGHT.dec()
            status, seconds = seen.get("status", CLIENT_CLOSED), time.perf_counter() - began
            _count(scope, status, seconds)
            own.end(_template(scope), status)
            write_request(own, _template(scope), status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, seen: dict[str, int]) -> None:
        try:
            body = await _read(receive, self.limit_of(scope), _content_length(scope))
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
        except LabError as error:  # the body is not wanted
            await response(error, scope["path"])(scope, receive, send)
        except Exception as error:  # the last line: whatever it is, the client gets an id and the log the traceback
            problem = unexpected(error)
            if "status" not in seen:
                await response(problem, scope["path"])(scope, receive, send)


def _content_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


async def _read(receive: Receive, limit: int, announced: int) -> bytes | None:
    """Return the whole body, or None if the client left; `BodyTooLarge` once it is over the limit."""
    body, size = [], announced
    while True:
        if size > limit:
            raise BodyTooLarge(
                f"the request body has {'at least ' if not announced else ''}{size} bytes", f"at most {limit} bytes"
            )
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body.append(message.get("body", b""))
        size = max(announced, sum(map(len, body)))
        if not message.get("more_body", False) and size <= limit:
            return b"".join(body)


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
