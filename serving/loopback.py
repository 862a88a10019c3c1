"""HTTP to an engine on this machine: one request, and its answer piece by piece as it comes.

What the gateway computes for a token is taken from an engine that has all cores, and between two tokens the caches are full of
weights. So this does for a token only what it must, where a client for all servers does more. Answers are read by httptools, as
the gateway's server reads requests. Each request has a connection of its own, closed after it: llama.cpp closes one after a
stream, and does not say so.

    async with ask("127.0.0.1", 8081, "POST", "/v1/completions", body, silence_seconds=60.0) as answer:
        async for data in answer.events():
            ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from httptools import HttpParserError, HttpResponseParser

CONNECT_SECONDS = 5.0
MOST_BYTES = 65536  # of a body that nobody takes, before the connection is not read any more
SIZED = (b"content-length", b"transfer-encoding")  # an answer without either ends where its connection does


class Lost(Exception):
    """There is no connection, or it broke before the end of the answer."""


class Silent(Lost):
    """Nothing came for too long."""


@asynccontextmanager
async def ask(
    host: str, port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *,
    silence_seconds: float,
) -> AsyncIterator[Answer]:  # fmt: skip
    """Send a request and yield its answer once the head of it has come; the connection is closed with the block.

    Args:
        host: an IP address.
        port: its port.
        method: of HTTP.
        path: with its query.
        body: JSON, or nothing.
        headers: beside those that every request has.
        silence_seconds: longest time between two pieces of the answer.

    Raises:
        Lost: also while the answer is read.
        Silent: so, too.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            transport, answer = await loop.create_connection(lambda: Answer(loop, silence_seconds), host, port)
    except OSError as error:  # TimeoutError is one
        raise Lost(type(error).__name__) from error
    try:
        transport.write(_head(f"{host}:{port}", method, path, len(body), headers or {}) + body)
        await answer.begin()
        yield answer
    finally:
        transport.close()


class Answer(asyncio.Protocol):
    """An answer; its body is read once.

    Args:
        loop: that it comes in.
        silence_seconds: longest wait for a piece.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, silence_seconds: float) -> None:
        self.status = 0
        self._loop, self._parser = loop, HttpResponseParser(self)
        self._came = bytearray()  # of the body, and not taken
        self._sized = self._whole = self._paused = False
        self._error: Exception | None = None
        self._silence_seconds = silence_seconds
        self._waiter: asyncio.Future[None] | None = None
        self._waits_since = 0.0

    async def begin(self) -> None:
        """Wait for the head."""
        while not self.status:
            await self._more()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield what each server-sent event carries: the rest of every line that begins with `data:`, unless it is empty."""
        rest = b""
        while True:
            while not self._came:
                if self._whole:
                    return
                await self._more()
            *lines, rest = (rest + self._taken()).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and (data := line[5:].strip()):
                    yield data

    async def read(self) -> bytes:
        """Return the whole body."""
        pieces = [self._taken()]
        while not self._whole:
            await self._more()
            pieces.append(self._taken())
        return b"".join(pieces)

    async def _more(self) -> None:
        """Wait until something came that the caller may look for; raises what no more comes for."""
        if self._error:
            raise self._error
        self._waiter, self._waits_since = self._loop.create_future(), self._loop.time()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _taken(self) -> bytes:
        """Return the part of the body that came and was not taken."""
        taken = bytes(self._came)
        self._came.clear()
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
        return taken

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Let the next wait, or the one that is on, know that no more comes."""
        self._error = self._error or error
        self._wake()

    def _look(self) -> None:
        """End a wait that is too long, or look again when this one would be; a timer for each piece would cost more."""
        left = self._waits_since + self._silence_seconds - self._loop.time() if self._waiter else self._silence_seconds
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self._fail(Silent())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep the connection, and watch how long it is silent."""
        self._transport = transport
        self._watch = self._loop.call_later(self._silence_seconds, self._look)

    def data_received(self, data: bytes) -> None:
        """Read what came; of more than the reader keeps up with, the rest waits in the connection."""
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._fail(Lost(type(error).__name__))
            return
        if len(self._came) > MOST_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take it as the end of an answer that says no other."""
        self._watch.cancel()
        if self.status and not self._sized:
            self._whole = True
        if self._whole:
            self._wake()
        else:
            self._fail(Lost(type(exc).__name__ if exc else "it was closed"))

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: ARG002 - httptools' signature
        """Know from a header whether the answer says where it ends."""
        self._sized = self._sized or name.lower() in SIZED

    def on_headers_complete(self) -> None:
        """Take the status."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._came += body

    def on_message_complete(self) -> None:
        """Know that the body is whole."""
        self._whole = True


def _head(host: str, method: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
    """Return request line and headers.

    Raises:
        ValueError: one of them would be two.
    """
    known = {"Host": host, "Connection": "close", "Content-Type": "application/json", "Content-Length": str(length)}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (known | dict(headers)).items())]
    if any(character < " " for line in lines for character in line):
        raise ValueError("a line of a request's head has a control character")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
