"""The gateway's connection to its engine: answers whole, however they are cut; broken, silent and endless ones told apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serving.loopback import Answer, Lost, Silent, ask

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
EVENTS = b'data: {"a": 1}\n\n: a comment\nevent: token\ndata:{"b": "\xc3\xa9"}\n\ndata:   \n\ndata: [DONE]\n\n'
SEEN = [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@asynccontextmanager
async def engine(reply: Reply) -> AsyncIterator[int]:
    """Yield the port of a server that reads a request and leaves the rest to `reply`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
            await reader.readexactly(int(length))
            await reply(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def saying(*pieces: bytes, pause: float = 0.0) -> Reply:
    async def reply(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return reply


def asked(reply: Reply, take: Callable[[Answer], Awaitable[Any]], silence_seconds: float = 10.0) -> Any:
    """Return what `take` makes of the answer."""

    async def run() -> Any:
        async with engine(reply) as port, ask(
            "127.0.0.1", port, "POST", "/v1/completions", b"{}", silence_seconds=silence_seconds
        ) as answer:  # fmt: skip
            return answer.status, await take(answer)

    return asyncio.run(asyncio.wait_for(run(), 20))


async def events(answer: Answer) -> list[bytes]:
    return [data async for data in answer.events()]


async def body(answer: Answer) -> bytes:
    return await answer.read()


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("cut", [1, 11, 5000])
def test_events_are_whole_however_the_answer_is_cut(size: int, cut: int) -> None:
    sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS, size)
    pieces = [sent[at : at + cut] for at in range(0, len(sent), cut)]
    assert asked(saying(*pieces), events) == (200, SEEN)
    assert asked(saying(*pieces), body) == (200, EVENTS)


def test_an_answer_of_stated_length_and_one_that_ends_with_its_connection() -> None:
    assert asked(saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"), body) == (404, b"{}")
    assert asked(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), body) == (200, b"")
    assert asked(saying(b"HTTP/1.0 500 Broken\r\n\r\n<html>", b"</html>"), body) == (500, b"<html></html>")


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"HTTP/1.1 200", HEAD + b"Content-Length: 100\r\n\r\nhalf", b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS, 8)[:-9],
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nno chunk\r\n",
    ],
)  # fmt: skip
def test_an_answer_that_breaks_off_or_is_none_is_lost(sent: bytes) -> None:
    with pytest.raises(Lost):
        asked(saying(sent), body)


def test_nobody_who_listens() -> None:
    async def run() -> None:
        async with engine(saying()) as port:
            pass
        async with ask("127.0.0.1", port, "GET", "/health", silence_seconds=1):
            pass

    with pytest.raises(Lost, match="ConnectionRefusedError"):
        asyncio.run(run())


def test_silence_has_an_end_and_slowness_has_none() -> None:
    slow = [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *(b"8\r\ndata: x\n\r\n" for _ in range(8)), b"0\r\n\r\n"]
    assert asked(saying(*slow, pause=0.15), events, silence_seconds=0.6) == (200, [b"x"] * 8)
    for mute in (saying(b"", pause=5), saying(slow[0], slow[1], pause=5)):
        began = time.perf_counter()
        with pytest.raises(Silent):
            asked(mute, events, silence_seconds=0.4)
        assert 0.3 < time.perf_counter() - began < 2


def test_one_who_is_slow_to_read_is_not_told_of_silence_and_does_not_fill_the_memory() -> None:
    piece, written = b"%x\r\n%s\r\n" % (65536, b"\n" * 65536), []

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000):
            writer.write(piece)
            await writer.drain()
            written.append(len(piece))
        writer.write(b"8\r\ndata: z\n\r\n0\r\n\r\n")
        await writer.drain()

    async def late(answer: Answer) -> tuple[int, list[bytes]]:
        await asyncio.sleep(0.8)
        return sum(written), [data async for data in answer.events()]

    _, (before, seen) = asked(endless, late, silence_seconds=0.3)
    assert before < 30e6 < sum(written), "what nobody takes waits in the sockets"
    assert seen == [b"z"]


def test_the_engine_sees_at_once_that_nobody_reads_any_more() -> None:
    gone: list[float] = []

    async def until_gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n8\r\ndata: x\n\r\n")
        await reader.read()
        gone.append(time.perf_counter())

    async def one(answer: Answer) -> bytes:
        return await anext(answer.events())

    async def run() -> float:
        async with engine(until_gone) as port:
            async with ask("127.0.0.1", port, "POST", "/", silence_seconds=5) as answer:
                assert await one(answer) == b"x"
            left = time.perf_counter()
            while not gone:
                await asyncio.sleep(0.005)
            return gone[0] - left

    assert asyncio.run(asyncio.wait_for(run(), 20)) < 0.2


@pytest.mark.parametrize("headers", [{"traceparent": "a\r\nX-Admin: yes"}, {"x\n": "1"}])
def test_a_header_that_would_be_two_is_not_sent(headers: dict[str, str]) -> None:
    async def run() -> None:
        async with engine(saying()) as port, ask("127.0.0.1", port, "GET", "/", headers=headers, silence_seconds=1):
            pass

    with pytest.raises(ValueError, match="control character"):
        asyncio.run(run())
