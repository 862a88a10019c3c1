"""The bench of serving: its load and figures against a server whose delays are known, and in earnest, in short."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs.bench.serve import OVERLOAD, RATED, Sizes, bench_serve, chosen, draw
from labs.bench.serve_figures import Limits, percentiles, summary, tokens_within
from labs.bench.serve_load import Outcome, Target, answered, arrivals, client, closed_loop, open_loop, send, story
from labs.bench.serve_speculation import is_extract
from pipelines.config import ROOT
from pipelines.errors import EngineError, UnknownName
from tests.conftest import MODEL

FIRST_SECONDS, BETWEEN_SECONDS = 0.08, 0.02


class Server:
    """An OpenAI endpoint of known delays; `max_tokens` chooses how long a reply is, 429 or 500 that status, 7 a broken stream."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.gaps: list[float] = []
        self.firsts: list[float] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                self.heads.append(head)
                size = int(head.split("content-length:")[1].split("\r\n")[0]) if "content-length:" in head else 0
                body = json.loads(await reader.readexactly(size) or "{}")
                self.bodies.append(body)
                await self._reply(writer, body)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client or the test is done
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        tokens = body.get("max_tokens", 0)
        if not body or tokens >= 100:
            content = json.dumps({"data": [{"id": "first"}, {"id": "second"}]})
            status = f"HTTP/1.1 {tokens or 200} Status\r\nRetry-After: 0.05\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(status.encode() + content.encode())
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self._event(writer, {"choices": [{"delta": {"role": "assistant"}}]})
        for number in range(tokens):
            before = time.perf_counter()
            await asyncio.sleep(BETWEEN_SECONDS if number else FIRST_SECONDS)
            (self.gaps if number else self.firsts).append(time.perf_counter() - before)
            await self._event(writer, {"choices": [{"delta": {"content": "x"}}]})
        if tokens == 7:
            await self._event(writer, {"error": {"message": "the engine is gone"}})
        await self._event(writer, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    async def _event(self, writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
        data = f"data: {json.dumps(content)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()


@asynccontextmanager
async def server() -> AsyncIterator[tuple[Server, Target]]:
    made = Server()
    listening = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    async with listening:
        yield made, Target(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "m", key="secret")


def one(**of: Any) -> Outcome:
    """An outcome that was sent at 0."""
    return Outcome(**{"sent": 0.0, "status": 200, "completion_tokens": len(of.get("token_times", [])), **of})


def test_figures_are_those_of_their_definitions() -> None:
    outcomes = [
        one(token_times=[0.1, 0.2, 0.3], end=0.35, prompt_tokens=10),
        one(token_times=[0.4, 0.9], end=1.0), one(token_times=[0.2], end=2.0),
        one(status=429, end=0.01), one(status=503, end=0.5), one(token_times=[0.5], error="broken"),
    ]  # fmt: skip
    found = summary(outcomes, Limits(ttft_seconds=0.3, e2e_seconds=1.5))
    assert (found["requests"], found["completed"], found["refused"], found["server_errors"]) == (6, 3, 1, 2)
    assert found["seconds"] == 2.0
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1.5, 3.0, 8.0)
    assert found["goodput"] == 0.5, "the second is late with its first token, the third with its last"
    assert found["ttft_seconds"]["p50"] == 0.2 and found["ttft_seconds"]["p99"] == pytest.approx(
        np.percentile([0.1, 0.2, 0.4], 99)
    )
    assert found["tpot_seconds"]["mean"] == pytest.approx((0.1 + 0.5) / 2)
    assert found["itl_seconds"]["p50"] == pytest.approx(0.1)
    assert found["e2e_seconds"]["p90"] == pytest.approx(np.percentile([0.35, 1.0, 2.0], 90))
    assert found["refused_seconds"]["p99"] == 0.01


def test_figures_of_nothing_are_none() -> None:
    found = summary([one(status=500, end=1.0)], Limits())
    assert found["completed"] == found["goodput"] == found["seconds"] == 0
    assert found["ttft_seconds"] == percentiles([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_tokens_of_unfinished_replies_count_up_to_the_end_of_the_window() -> None:
    assert tokens_within([one(token_times=[0.5, 1.0, 1.5]), one(sent=0.3, token_times=[0.9, 1.2], end=1.2)], 1.0) == 3


def test_arrivals_are_a_poisson_process_that_repeats() -> None:
    times = list(islice(arrivals(50.0, seed=3), 4001))
    gaps = np.diff(times)
    assert times[0] == 0 and times == list(islice(arrivals(50.0, seed=3), 4001)) != list(islice(arrivals(50.0, seed=4), 4001))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05), "exponential: as wide as its mean"
    assert list(islice(arrivals(math.inf, seed=3), 3)) == [0, 0, 0]


def test_no_two_requests_are_alike() -> None:
    assert len({json.dumps(story(3)) for _ in range(50)}) == 50


def run(test: Callable[[Server, Target], Any]) -> Any:
    async def main() -> Any:
        async with server() as (made, target):
            return await test(made, target)

    return asyncio.run(main())


def test_the_times_of_a_load_are_those_of_the_server() -> None:
    async def load(made: Server, target: Target) -> dict[str, Any]:
        await open_loop(target, [story(1)], rate=1.0)  # the first request of a process takes longer
        found = summary(await open_loop(target, [story(5) for _ in range(12)], rate=15.0), Limits(ttft_seconds=10))
        assert {body["model"] for body in made.bodies} == {"m"} and made.bodies[0]["stream_options"] == {"include_usage": True}
        assert all("authorization: bearer secret" in head for head in made.heads)
        return found | {"gap": float(np.median(made.gaps)), "first": float(np.median(made.firsts))}

    found = run(load)
    assert found["completed"] == 12 and found["goodput"] == found["request_throughput"]
    assert FIRST_SECONDS <= found["ttft_seconds"]["p50"] < found["first"] + 0.3, "the rest is the way, on a busy machine"
    assert found["itl_seconds"]["p50"] == pytest.approx(found["gap"], abs=0.01)
    assert BETWEEN_SECONDS <= found["tpot_seconds"]["mean"] < 10 * BETWEEN_SECONDS
    assert found["e2e_seconds"]["p50"] >= found["ttft_seconds"]["p50"] + 4 * BETWEEN_SECONDS
    assert found["output_throughput"] == pytest.approx(5 * found["request_throughput"])
    assert found["total_token_throughput"] == pytest.approx(10 * found["request_throughput"])


def test_refusals_errors_and_broken_streams_are_told_apart() -> None:
    async def load(_: Server, target: Target) -> list[Outcome]:
        async with client(target) as http:
            return [await send(http, target, story(tokens)) for tokens in (429, 500, 7)]

    refused, error, broken = run(load)
    assert refused.refused and not refused.failed and refused.retry_after_seconds == 0.05
    assert error.failed and not error.refused
    assert broken.failed and not broken.completed and "gone" in broken.error and len(broken.token_times) == 7


def test_a_server_that_is_not_there_is_an_outcome() -> None:
    async def load(_: Server, target: Target) -> Outcome:
        nobody = Target("http://127.0.0.1:9", target.model)
        async with client(nobody) as http:
            return await send(http, nobody, story(1))

    out = run(load)
    assert (out.status, out.failed, out.error) == (0, True, "ConnectError")
    with pytest.raises(EngineError, match="status 0 ConnectError"):
        answered(out)  # two replies that never came are no equal replies


def test_streams_are_kept_busy_until_the_time_is_up() -> None:
    async def load(_: Server, target: Target) -> list[Outcome]:
        return await closed_loop(target, lambda: story(3), 4, 0.5)

    outcomes = run(load)
    done = [out for out in outcomes if out.completed]
    assert 1 <= len(done) <= 4 * 5 and len(outcomes) - len(done) <= 4
    assert max(sum(a.sent <= b.sent < a.end for a in done) for b in done) <= 4
    gaps = [min((b.sent - a.end for b in outcomes if b.sent > a.end), default=0.0) for a in done]
    assert np.median(gaps) < 0.05, "a stream that was answered asks again at once, whatever the others do"


def test_a_stream_that_was_refused_comes_again_when_it_was_told_to() -> None:
    async def load(_: Server, target: Target) -> list[Outcome]:
        bodies = iter([story(429), *(story(3) for _ in range(1000))])
        return await closed_loop(target, lambda: next(bodies), 1, 0.5)

    refused, again, *_ = run(load)
    assert refused.refused and refused.retry_after_seconds <= again.sent - refused.end < 0.05 + 0.3


def bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "labs", "bench", "serve", *options], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_an_endpoint_is_measured_from_outside() -> None:
    async def load(made: Server, target: Target) -> dict[str, Any]:
        options = ("--url", f"{target.url}/v1", "--rate", "50", "--requests", "5", "--reply-tokens", "3")
        done = await asyncio.to_thread(bench, *options, LLMLAB_BENCH_KEY="k1")
        assert done.returncode == 0, done.stderr
        assert "authorization: bearer k1" in made.heads[0] and "k1" not in done.stdout + done.stderr
        assert {body.get("model", "first") for body in made.bodies} == {"first"}, "the first model of its list"
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    assert run(load)["completed"] == 5


def test_a_contender_must_exist() -> None:
    with pytest.raises(UnknownName, match="triton"):
        chosen(["triton"])


@pytest.mark.parametrize(
    ("reply", "extract"),
    [
        ("The lab serves small models on a CPU and on a GPU.", True),
        ("[1] The lab serves small models on a CPU and on a", True),
        ("The lab serves small models on a CP", True),  # cut off within a word
        ("The lab can serve models which are small, on CPUs or GPUs.", False),
        ("serves small models", False),  # too short to tell
        ("", False),
    ],
)
def test_a_reply_is_an_extract_if_its_words_stand_in_the_prompt(reply: str, extract: bool) -> None:
    prompt = "Passages:\n[1] The lab serves small models\non a CPU and on a GPU.\n\nRepeat the text of passage [1] word for word."
    assert is_extract(reply, prompt) == extract


@pytest.mark.slow
def test_engine_and_gateway_are_measured(tmp_path: Path) -> None:
    sizes = Sizes(1.5, 1, 1, 5.0, 3, 1, (RATED, OVERLOAD), 2.0, 16, 1)
    document = bench_serve(MODEL, sizes, ["gateway"], lambda *_: None, lambda _: None)
    assert set(document["tokens_per_second"]) == {"engine", "gateway"} and set(document["left_out"]) == {
        "transformers_serve",
        "vllm",
    }
    assert document["tokens_per_second"]["engine"]["1"] > 0 and document["tokens_per_second"]["gateway"]["1"] > 0
    assert document["ratio_to_transformers_serve"] is None
    assert document["leaked"]["slots"] == 0 and document["server_errors"] == 0 and document["mixed"]["requests"] == 16
    assert 0 < document["warm_ttft_ratio"] < 0.5
    assert document["speculation_ratio_all"] > 0 and 0 <= document["speculation_equal_replies"] <= 1
    draw(document, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(document)
