"""The HTTP server: uvicorn, with what it lacks for strangers as clients.

- A connection is closed that sends no head of a request, or takes nothing of its answer, for too long (slow-loris), and one
  whose head has no end: httptools, which reads requests in a fraction of h11's time, knows no limit of its own.
- A connection beyond the limit is told so with 429; uvicorn's own `limit_concurrency` would count busy ones only and say 503.
- A signal begins a drain, during which the port stays open and answers 503; a second one ends everything at once.

Slow bodies are `serving.edge`'s. `serving.launch` runs it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from monitoring.metrics import ADMISSION_REFUSED, GATEWAY_TASKS
from serving.drain import Drain
from serving.problems import Overloaded, openai_body
from serving.settings import ConnectionBounds

LONGEST_HEAD_BYTES = 65536  # of request line and headers, as with h11
TICKS = 10  # in a second
CUT_SECONDS = 1  # until requests are cancelled whose time is over


class Connection(HttpToolsProtocol):
    """One client's connection; `bounds` is set by `server`."""

    bounds: ConnectionBounds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = None  # of a head that has begun, without what came together with its beginning
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the time for the first head, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.limit:
            transport.write(_too_many(self.bounds.limit))
            transport.close()
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes or 0) > LONGEST_HEAD_BYTES:
            self.send_400_response(f"the head of a request has at most {LONGEST_HEAD_BYTES} bytes here")
        self._time_head()

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a head."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """End that."""
        self._head_bytes = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Begin the time in which the client has to take what is ready for it."""
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.bounds.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End that time."""
        super().resume_writing()
        self._unread = _stopped(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget both times."""
        self._head, self._unread = _stopped(self._head), _stopped(self._unread)
        super().connection_lost(exc)

    def _time_head(self) -> None:
        """Let the time for a head run while one is awaited."""
        if self.cycle is None or self.cycle.response_complete:
            self._head = self._head or self.loop.call_later(self.bounds.header_seconds, self.transport.close)
        else:
            self._head = _stopped(self._head)


class DrainingServer(uvicorn.Server):
    """A server that stops when its drain is over."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self.drain = drain
        self.on_started: Callable[[], object] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        await super().startup(sockets)
        self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        """Begin the drain at the first signal, and end at once at the second."""
        if self.drain.begun:
            self.drain.end()  # uvicorn's own force_exit would leave the application without its end
        self.drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; asked ten times a second."""
        if not counter % TICKS:
            GATEWAY_TASKS.set(len(asyncio.all_tasks()))  # of this loop; a scrape may be answered by another worker
        return await super().on_tick(counter) or self.drain.over


def server(app: ASGIApp, drain: Drain, bounds: ConnectionBounds, tls: ssl.SSLContext | None) -> DrainingServer:
    """Return the server of an application, ready to run.

    Args:
        app: the application.
        drain: says when it stops.
        bounds: of connections.
        tls: what it speaks TLS by; None for plain HTTP.
    """
    protocol = type("BoundedConnection", (Connection,), {"bounds": bounds})
    config = uvicorn.Config(app, http=protocol, log_config=None, access_log=False, server_header=False, ws="none",
                            timeout_graceful_shutdown=CUT_SECONDS,
                            ssl_context_factory=(lambda *_: tls) if tls else None)  # fmt: skip
    return DrainingServer(config, drain)


def _too_many(limit: int) -> bytes:
    ADMISSION_REFUSED.labels(reason="connections").inc()
    error = Overloaded(f"there are {limit} connections, which is all that there is room for", "requests", 1.0)
    body = json.dumps(openai_body(error)).encode()
    head = ["HTTP/1.1 429 Too Many Requests", "Content-Type: application/json", f"Content-Length: {len(body)}",
            f"Retry-After: {error.retry_after_seconds}", "Connection: close"]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + body


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer, if there is one, and return what takes its place: none."""
    if timer:
        timer.cancel()
    return None
