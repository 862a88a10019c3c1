"""Load for a server: chat requests at the times of a Poisson process, or in so many streams; each token's time is kept.

It speaks to any OpenAI endpoint and to /v1/rag/query, both as server-sent events. It measures and starts nothing by itself;
`labs.bench.serve_figures` makes figures of what it returns, `llmlab bench serve --url URL` runs it alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from pipelines.errors import EngineError

if TYPE_CHECKING:
    import httpx

CHAT_PATH, RAG_PATH = "/v1/chat/completions", "/v1/rag/query"
TOO_MANY = 429
PAUSE_SECONDS = 0.1  # of a stream that was refused without a Retry-After
SILENCE_SECONDS = 600.0
TOPICS = ("a lighthouse", "the night train", "two brothers", "a lost map", "the old mill", "a quiet town", "the last ship")

_numbers = count(1)


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: address, without /v1.
        model: value of `model`.
        key: sent as a bearer token; "" for none.
        usage: True to ask for `usage` on streams, which some servers refuse.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    usage: bool = True


@dataclass
class Outcome:
    """What became of one request; times are those of `time.perf_counter`, NaN for what did not happen.

    Attributes:
        sent: when it was sent.
        status: HTTP status; 0 if no answer began.
        token_times: when each piece of text came; a piece is one token with the servers measured here.
        end: when the stream ended.
        prompt_tokens: as the server counts; 0 if it does not say.
        completion_tokens: as the server counts, else the number of pieces.
        text: the reply.
        error: what went wrong after the status, or instead of one.
        retry_after_seconds: when to come again, as a refusal says.
    """

    sent: float
    status: int = 0
    token_times: list[float] = field(default_factory=list)
    end: float = math.nan
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str = ""
    retry_after_seconds: float = PAUSE_SECONDS

    @property
    def completed(self) -> bool:
        """Return True if the whole reply came."""
        return self.status == 200 and not self.error and not math.isnan(self.end)

    @property
    def refused(self) -> bool:
        """Return True if the server said that it has too much to do."""
        return self.status == TOO_MANY

    @property
    def failed(self) -> bool:
        """Return True for an error of the server: a 5xx, a broken stream or no answer."""
        return self.status >= 500 or bool(self.error)

    @property
    def ttft_seconds(self) -> float:
        """Return the time to the first token."""
        return self.token_times[0] - self.sent if self.token_times else math.nan


def story(max_tokens: int) -> dict[str, Any]:
    """Return a chat request that no server has seen before, so that no prompt cache helps; its reply is long."""
    text = f"Story {next(_numbers)}: write a long story about {random.Random(next(_numbers)).choice(TOPICS)}."
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}


@asynccontextmanager
async def client(target: Target) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that bounds no connections and keeps none: servers close kept ones when they like."""
    import httpx

    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    verify = target.url.startswith("https:")  # or certificates would be read for nothing
    async with httpx.AsyncClient(base_url=target.url, headers=headers, limits=limits, timeout=SILENCE_SECONDS, verify=verify,
                                 trust_env=False) as made:  # fmt: skip
        yield made


async def send(http: httpx.AsyncClient, target: Target, body: Mapping[str, Any], path: str = CHAT_PATH,
               outcome: Outcome | None = None) -> Outcome:  # fmt: skip
    """Send one request and return what became of it; no error of the server is raised.

    Args:
        http: from `client`.
        target: the same server.
        body: without `model`; a stream unless it says otherwise.
        path: `CHAT_PATH` or `RAG_PATH`.
        outcome: is filled, so that it holds what came even if this is cancelled.
    """
    import httpx

    streams = body.get("stream", True) and path == CHAT_PATH
    options = {"stream_options": {"include_usage": True}} if target.usage and streams else {}
    out = outcome or Outcome(0.0)
    out.sent = time.perf_counter()
    try:
        async with http.stream("POST", path, json={"model": target.model, "stream": True, **options, **body}) as reply:
            out.status = reply.status_code
            if reply.status_code == 200:
                await _read(reply, out)
            else:
                out.text = (await reply.aread()).decode("utf-8", "replace")
                out.retry_after_seconds = float(reply.headers.get("Retry-After") or PAUSE_SECONDS)
        out.end = time.perf_counter()
    except (httpx.HTTPError, ValueError) as error:
        out.error = type(error).__name__
    return out


def answered(out: Outcome) -> Outcome:
    """Return a request that was answered with text.

    Raises:
        EngineError: it was not.
    """
    if not out.completed or not out.token_times:
        raise EngineError(
            f"a request was not answered: status {out.status} {out.error or out.text[:300]}", "a reply", "make doctor"
        )
    return out


async def closed_loop(target: Target, body: Callable[[], dict[str, Any]], streams: int, seconds: float) -> list[Outcome]:
    """Keep so many requests under way for some seconds, then leave those that are not finished.

    Args:
        target: the server.
        body: makes the next request.
        streams: requests at a time; the next one starts when one ends.
        seconds: how long.
    """
    outcomes: list[Outcome] = []

    async def stream() -> None:
        while True:
            mine = Outcome(time.perf_counter())
            outcomes.append(mine)
            await send(http, target, body(), outcome=mine)
            if not mine.completed:
                await asyncio.sleep(mine.retry_after_seconds)

    async with client(target) as http:
        await _for(seconds, [asyncio.create_task(stream()) for _ in range(streams)])
    return outcomes


async def open_loop(target: Target, bodies: Iterable[dict[str, Any]], rate: float, seed: int = 0) -> list[Outcome]:
    """Send requests at the times of a Poisson process, whatever the server makes of them; return when all are done.

    Args:
        target: the server.
        bodies: the requests.
        rate: requests a second on the mean; infinite sends all at once.
        seed: of the times.
    """
    async with client(target) as http, asyncio.TaskGroup() as group:
        began, tasks = asyncio.get_running_loop().time(), []
        for due, body in zip(arrivals(rate, seed), bodies, strict=False):
            await asyncio.sleep(began + due - asyncio.get_running_loop().time())
            tasks.append(group.create_task(send(http, target, body)))
    return [task.result() for task in tasks]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yield the times of a Poisson process in seconds, without end; the first request comes at once."""
    drawn, due = random.Random(seed), 0.0
    while True:
        yield due
        due += drawn.expovariate(rate) if math.isfinite(rate) else 0.0


async def _for(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    """Let tasks run for a time and cancel them; one that ends with an error ends all."""
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(reply: httpx.Response, out: Outcome) -> None:
    """Take the tokens and counts from a stream of server-sent events."""
    kind = ""
    async for line in reply.aiter_lines():
        if line.startswith("event:"):
            kind = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data != "[DONE]":
                _take(json.loads(data), kind, out)


def _take(event: Mapping[str, Any], kind: str, out: Outcome) -> None:
    if "error" in event:
        out.error = str(event["error"])[:200]
        return
    text = event["text"] if kind == "token" else "".join(
        choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ())
    )  # fmt: skip
    if text:
        out.token_times.append(time.perf_counter())
        out.text += text
        out.completion_tokens += 1
    if usage := event.get("usage"):
        out.prompt_tokens, out.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
