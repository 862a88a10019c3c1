"""Work for a client ends when it leaves: `WhilePresent` for what comes before an answer, `EventStream` for a streamed one.

Starlette's own streaming response does so with a group of tasks for each answer; one task that watches the connection is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass a stream on as it comes


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


class WhilePresent:
    """Cancels the block, which then raises `ClientGone`, when the client leaves; its request has been read to its end.

    Args:
        receive: of the ASGI request.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._left = receive, False

    def __enter__(self) -> None:
        """Begin to watch the connection."""
        self._task = asyncio.current_task()
        self._watch = asyncio.ensure_future(_disconnected(self._receive))
        self._watch.add_done_callback(self._end)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Watch no longer."""
        self._watch.cancel()
        if self._left and self._task:
            self._task.uncancel()
            if kind and issubclass(kind, asyncio.CancelledError):
                raise ClientGone from None

    def _end(self, watch: asyncio.Future[None]) -> None:
        if not watch.cancelled() and self._task:
            self._left = True
            self._task.cancel()


class EventStream(Response):
    """Server-sent events, sent as they come.

    A task of their own sends them: each step of the request's task goes through all layers of the application.

    Args:
        events: each in the form in which it is sent; closed at the end, whatever ends it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events, self.status_code, self.background = events, 200, None
        self.init_headers(NO_CACHE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the signature of ASGI
        """Send the stream."""
        try:
            with WhilePresent(receive):
                await asyncio.create_task(self._send(send))
        except ClientGone:
            return

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
