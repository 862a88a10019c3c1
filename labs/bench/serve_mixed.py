"""Many mixed requests to a gateway, some of whose clients leave, and what the gateway has not given back afterwards.

Half of the requests are read to their end: chats as a stream or in one piece, and questions about documents. A third are left
at a random moment, before or within their reply; the rest are faulty. Counted afterwards, against before: the engine's slots
that are busy, the gateway's open files, its tasks, and memory.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labs.bench.serve_contenders import Served
from labs.bench.serve_load import CHAT_PATH, RAG_PATH, Outcome, client, send, story

if TYPE_CHECKING:
    import httpx

SEED = 29
AT_ONCE = 8
WARM_UP_SHARE = 0.2  # of the requests, before memory and files are counted for the first time
SETTLE_SECONDS = 20.0
IDLE_SECONDS = 3.0  # after which connections that are kept for a next request are closed
REPLY_TOKENS = 6
LONGEST_WAIT_SECONDS = 0.4  # of a client that leaves
FAULTY: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**9},
    {"messages": 3},
)
QUESTION = {"question": "Which open models allow commercial use?", "max_tokens": REPLY_TOKENS}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class State:
    """What is in use: slots of the engine, files and tasks of the gateway, resident bytes of both."""

    slots: int
    files: int
    tasks: int
    gateway_bytes: int
    engine_bytes: int


async def mixed(served: Served, requests: int, progress: Progress) -> dict[str, Any]:
    """Send mixed requests and return what is left of them: `leaked`, `memory_drift` and `server_errors`.

    Args:
        served: gateway and engine.
        requests: how many.
        progress: is told (stage, done, total).
    """
    drawn = random.Random(SEED)
    async with client(served.gateway) as http:
        warm_up = max(1, round(requests * WARM_UP_SHARE))
        outcomes = await _send(http, served, warm_up, drawn, lambda done: progress("mixed requests", done, requests))
        before = await _settled(http, served)
        outcomes += await _send(
            http, served, requests - warm_up, drawn, lambda done: progress("mixed requests", warm_up + done, requests)
        )
        after = await _settled(http, served)
    leaked = {"slots": after.slots, "files": max(0, after.files - before.files), "tasks": max(0, after.tasks - before.tasks)}
    return {
        "requests": requests, "completed": sum(out.completed for out in outcomes),
        "leaked": leaked,
        "memory_drift": after.gateway_bytes / before.gateway_bytes - 1,
        "engine_memory_drift": after.engine_bytes / before.engine_bytes - 1,
        "server_errors": sum(out.failed for out in outcomes),
    }  # fmt: skip


async def _send(
    http: httpx.AsyncClient, served: Served, requests: int, drawn: random.Random, told: Callable[[int], None]
) -> list[Outcome]:
    """Send requests, a few at a time."""
    outcomes: list[Outcome] = []
    left = iter(range(requests))

    async def stream() -> None:
        for _ in left:
            outcomes.append(await _one(http, served, drawn))
            told(len(outcomes))

    await asyncio.gather(*(stream() for _ in range(AT_ONCE)))
    return outcomes


async def _one(http: httpx.AsyncClient, served: Served, drawn: random.Random) -> Outcome:
    """Send one request of a kind that is drawn."""
    kind = drawn.random()
    if kind < 0.25:
        return await send(http, served.gateway, story(REPLY_TOKENS))
    if kind < 0.4:
        return await send(http, served.gateway, {**story(REPLY_TOKENS), "stream": False})
    if kind < 0.5:
        return await send(http, served.gateway, QUESTION, RAG_PATH)
    if kind < 0.65:
        return await send(http, served.gateway, drawn.choice(FAULTY))
    path, body = (CHAT_PATH, story(100)) if kind < 0.9 else (RAG_PATH, QUESTION)
    return await _left(send(http, served.gateway, body, path), drawn.uniform(0, LONGEST_WAIT_SECONDS))


async def _left(request: Awaitable[Outcome], seconds: float) -> Outcome:
    """Leave a request after a time; one that was quicker ends as it does."""
    try:
        return await asyncio.wait_for(request, seconds)
    except TimeoutError:
        return Outcome(time.perf_counter())


async def _settled(http: httpx.AsyncClient, served: Served) -> State:
    """Return what is in use once nothing is under way, or after a time that is long enough for it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        state = await _state(http, served)
        if state.slots == 0 or time.monotonic() > deadline:
            await asyncio.sleep(IDLE_SECONDS)
            return await _state(http, served)
        await asyncio.sleep(0.2)


async def _state(http: httpx.AsyncClient, served: Served) -> State:
    from monitoring.metrics import GATEWAY_TASKS, series_name
    from serving.engines.llamacpp import LlamaCpp

    names = LlamaCpp().metric_names
    engine = await _metrics(http, f"{served.engine.url}{LlamaCpp.metrics_path}")
    gateway = await _metrics(http, "/metrics")
    return State(
        slots=int(engine[names["running"]] + engine[names["waiting"]]), files=served.process.num_fds(),
        tasks=int(gateway[series_name(GATEWAY_TASKS)]), gateway_bytes=served.process.memory_info().rss,
        engine_bytes=sum(child.memory_info().rss for child in served.process.children(recursive=True)),
    )  # fmt: skip


async def _metrics(http: httpx.AsyncClient, address: str) -> dict[str, float]:
    """Return the series without labels of a page for Prometheus."""
    from prometheus_client.parser import text_string_to_metric_families

    text = (await http.get(address)).text
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if not s.labels}
