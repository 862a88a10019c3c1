"""Several replies to one request, each generated as a request of its own and put together again.

llama.cpp takes `n` and several prompts, but counts the tokens of one reply only; generated apart, every token is counted, and
there may be more replies than slots. The prompt is read anew for each. Replies to one prompt get seeds that follow each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from serving.upstream import Meter, Upstream

Shape = Callable[[dict[str, Any]], dict[str, Any]]  # of one choice


def apart(asked: Mapping[str, Any], prompts: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Return one request for each reply: all replies to the first prompt, then those to the next."""
    n, seed = asked.get("n", 1), asked.get("seed")
    rest = {key: value for key, value in asked.items() if key not in ("n", "stream", "stream_options")}
    seeds: list[dict[str, Any]] = [{} if seed is None or number == 0 else {"seed": seed + number} for number in range(n)]
    each = [{"prompt": prompt} for prompt in prompts] or [{}]
    return [rest | own | seeded for own in each for seeded in seeds]


async def complete(upstream: Upstream, requests: Sequence[Mapping[str, Any]], n: int, path: str, shape: Shape) -> dict[str, Any]:
    """Return the completion that holds all replies; if one fails, the others are stopped and its error is raised.

    Args:
        upstream: the way to the engine.
        requests: of `apart`.
        n: replies to each prompt.
        path: of the engine's endpoint.
        shape: changes each choice.
    """
    tasks = [asyncio.ensure_future(upstream.complete(request, path)) for request in requests]
    try:
        parts = await asyncio.gather(*tasks)
    finally:
        await _end(tasks)
    choices = [shape(part["choices"][0] | {"index": index}) for index, part in enumerate(parts)]
    return parts[0] | {"choices": choices, "usage": _sum([part.get("usage") or {} for part in parts], n)}


async def stream(
    upstream: Upstream, requests: Sequence[Mapping[str, Any]], n: int, path: str, shape: Shape
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of all replies as they come, and last one with `usage` and no choices; arguments as of `complete`."""
    meters = [Meter(request["model"], path) for request in requests]
    one = len(requests) == 1
    arriving = upstream.stream(requests[0], meters[0], path) if one else _merged(upstream, requests, meters, path)
    first: dict[str, Any] = {}
    async with aclosing(arriving) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            first = first or {key: chunk[key] for key in ("id", "created", "object", "model") if key in chunk}
            chunk.pop("usage", None)
            if chunk.get("choices"):
                chunk.update(first)
                chunk["choices"] = [shape(choice) for choice in chunk["choices"]]
                yield chunk
    yield first | {"choices": [], "usage": _sum([meter.usage for meter in meters], n)}


async def _merged(
    upstream: Upstream, requests: Sequence[Mapping[str, Any]], meters: Sequence[Meter], path: str
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of all requests, each choice with the number of its request; closed early, all of them are stopped."""
    arrived: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue(maxsize=len(requests))
    tasks = [
        asyncio.ensure_future(_pump(upstream.stream(request, meter, path), index, arrived))
        for index, (request, meter) in enumerate(zip(requests, meters, strict=True))
    ]
    try:
        running = len(tasks)
        while running:
            what = await arrived.get()
            if isinstance(what, BaseException):
                raise what
            if what is None:
                running -= 1
            else:
                yield what
    finally:
        await _end(tasks)


async def _pump(chunks: AsyncIterator[dict[str, Any]], index: int, arrived: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                for choice in chunk.get("choices", ()):
                    choice["index"] = index
                await arrived.put(chunk)
    except Exception as error:  # to be raised where the chunks are read
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _sum(usages: Sequence[Mapping[str, int]], n: int) -> dict[str, int]:
    """Add up the tokens of all replies; those of a prompt count once, however many replies it got."""
    prompt = sum(usage.get("prompt_tokens", 0) for usage in usages[::n])
    reply = sum(usage.get("completion_tokens", 0) for usage in usages)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}
