"""A client that leaves ends the work for it, at once and only its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serving.leaving import ClientGone, EventStream, WhilePresent


class Connection:
    """One side of ASGI: `leave` closes it."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def ticks(closed: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        yield b"one"
        yield b"two"
        await asyncio.sleep(60)
        yield b"never"
    finally:
        closed.append("closed")


def test_the_block_ends_when_the_client_leaves() -> None:
    async def run() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.01, connection.left.set)
        with pytest.raises(ClientGone):
            with WhilePresent(connection.receive):
                await asyncio.sleep(60)
        await asyncio.sleep(0.01)  # the task goes on as any other
        task = asyncio.current_task()
        assert task and not task.cancelling()

    asyncio.run(run())


def test_a_block_that_ends_by_itself_is_left_alone() -> None:
    async def run() -> int:
        connection = Connection()
        with WhilePresent(connection.receive):
            await asyncio.sleep(0)
            found = 7
        connection.left.set()
        await asyncio.sleep(0.01)
        with WhilePresent(connection.receive), pytest.raises(LookupError):
            raise LookupError
        return found

    assert asyncio.run(run()) == 7


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def run() -> None:
        connection = Connection()

        async def work() -> None:
            with WhilePresent(connection.receive):
                await asyncio.sleep(60)

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_stream_is_closed_at_once() -> None:
    async def run() -> tuple[list[str], list[bytes]]:
        connection, closed = Connection(), list[str]()
        asyncio.get_running_loop().call_later(0.01, connection.left.set)
        await EventStream(ticks(closed))({}, connection.receive, connection.send)
        return closed, [message["body"] for message in connection.sent if "body" in message]

    closed, sent = asyncio.run(run())
    assert closed == ["closed"] and sent == [b"one", b"two"]


def test_a_stream_that_ends_is_whole() -> None:
    async def one() -> AsyncGenerator[bytes, None]:
        yield b"one"

    async def run() -> Connection:
        connection = Connection()
        await EventStream(one())({}, connection.receive, connection.send)
        return connection

    start, *bodies = asyncio.run(run()).sent
    assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert [(body["body"], body["more_body"]) for body in bodies] == [(b"one", True), (b"", False)]
