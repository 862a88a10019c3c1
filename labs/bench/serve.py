"""Serving measured in one run on one model: `llmlab bench serve`; one server from outside: `llmlab bench serve --url URL`.

    labs.bench.serve_load         requests, at the times of a Poisson process or in so many streams
    labs.bench.serve_figures      figures of them, in the terms of vLLM's benchmark
    labs.bench.serve_contenders   the servers: llama.cpp itself, our gateway before it, `transformers serve`, vLLM
    labs.bench.serve_speculation  what guessing tokens from the prompt brings
    labs.bench.serve_mixed        many mixed requests with clients that leave, and what is left of them

Here is what is measured in which order. The machine may be busy with other things, so contenders that are compared take
turns, a few seconds each; gateway and engine, which differ by little, do so once more with no other server on the machine,
and it is the ratio of two turns side by side that counts. No two requests are alike, so that no prompt cache helps, but where
it is the cache that is measured, and where it is what the gateway adds to the first token: there the engine's own time should
be short and steady.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from labs.bench.rag_sets import indexes_in
from labs.bench.serve_contenders import ENGINE, GATEWAY, TRANSFORMERS, VLLM, Served, gateway, missing, transformers_serve, vllm
from labs.bench.serve_figures import Limits, percentiles, summary, tokens_within
from labs.bench.serve_load import RAG_PATH, Target, answered, client, closed_loop, open_loop, send, story
from labs.bench.serve_mixed import mixed
from labs.bench.serve_speculation import speculation
from pipelines import catalogue
from pipelines.config import ROOT, unknown
from pipelines.errors import EngineError

CONTENDERS = (ENGINE, GATEWAY, TRANSFORMERS, VLLM)
STREAMS = (1, 8, 32)
ROOM_FOR_ALL = (f"admission.queued={max(STREAMS)}", "admission.wait_seconds=600")  # a closed loop has no use for refusals
REPLY_TOKENS, SHORT_REPLY_TOKENS = 64, 16
RATED_SHARE = 0.9  # of the requests a second that the engine's tokens a second make, with all slots busy
RATING_SECONDS = 5.0  # at least, so that prompts are read and replies come
RATED, OVERLOAD = 1.0, 3.0
LOADS_SEED = 7
QUESTIONS = ("What is the licence of {}?", "Who developed {}?")
DOCUMENTS = ("falcon-40b", "mistral-7b", "llama-2", "phi-2", "mpt-7b", "openchat", "openhermes", "mixtral-8x7b")

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        window_seconds: of one turn of a contender.
        turns: of each contender for each number of streams.
        side_by_side: pairs of turns, of engine and gateway, for each number of streams.
        side_seconds: of one of those turns.
        pairs: requests to engine and gateway in turns, for the time to first token.
        documents: that are asked about, cold and warm.
        loads: multiples of the rated load.
        load_seconds: of one load.
        requests: mixed ones, some of whose clients leave.
        extracts: passages that are to be repeated, for speculation.
    """

    window_seconds: float
    turns: int
    side_by_side: int
    side_seconds: float
    pairs: int
    documents: int
    loads: tuple[float, ...]
    load_seconds: float
    requests: int
    extracts: int


QUICK = Sizes(4.0, 2, 3, 3.0, 40, 4, (RATED, OVERLOAD), 12.0, 200, 8)
FULL = Sizes(10.0, 3, 12, 4.0, 200, 8, (0.25, 0.5, RATED, 1.5, 2.0, OVERLOAD), 40.0, 10_000, 48)


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the contenders to compare, all for None or none given.

    Raises:
        UnknownName: there is no such contender.
    """
    for name in names or ():
        if name not in CONTENDERS:
            raise unknown("contender", name, CONTENDERS)
    return tuple(names or CONTENDERS)


def bench_serve(
    model: str, sizes: Sizes, names: Sequence[str], progress: Progress, say: Say, *, quick: bool = False
) -> dict[str, Any]:
    """Return the document of a run; `left_out` in it says what took no part, and why.

    Args:
        model: a catalogue entry.
        sizes: how much is measured.
        names: of `CONTENDERS`; engine and gateway always take part.
        progress: is told (stage, done, total).
        say: receives lines for the user.
        quick: leave out what starts for long.

    Raises:
        LabError: a server does not start.
    """
    entry = catalogue.runnable(model)
    reasons = {name: missing(name, quick=quick) if name in names else "not asked for" for name in (TRANSFORMERS, VLLM)}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    with TemporaryDirectory() as folder:
        place = Path(folder)
        _index(place, progress)
        with gateway(model, place / "index", place / "gateway.log", ROOM_FOR_ALL) as served:
            targets = {ENGINE: served.engine, GATEWAY: served.gateway}
            with ExitStack() as stack:
                if TRANSFORMERS not in left_out:
                    targets[TRANSFORMERS] = stack.enter_context(transformers_serve(entry, place / "transformers.log"))
                if VLLM not in left_out:
                    targets[VLLM] = stack.enter_context(vllm(entry, place / "vllm"))
                say(f"{', '.join(targets)} are up")
                document = asyncio.run(_compared(served, targets, sizes, progress))
            document |= asyncio.run(ratio_to_engine(served, sizes, progress))
        with gateway(model, place / "index", place / "gateway.log") as bounded:
            document |= asyncio.run(_by_itself(bounded, sizes, progress))
    with TemporaryDirectory() as folder:
        guessed = speculation(entry, sizes.extracts, Path(folder), progress)
    errors = document["mixed"]["server_errors"] + sum(of["server_errors"] for of in document["loads"].values())
    return {"model": model, "slots": served.slots, **document, "server_errors": errors, **guessed, "left_out": left_out}


async def _compared(served: Served, targets: Mapping[str, Target], sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """Return what is compared with other servers, or with a time before."""
    for target in targets.values():
        await _warm_up(target)
    by_streams = await throughput(targets, sizes, progress)
    rag = await questions_again(served.gateway, sizes.documents, progress)
    peer = by_streams.get(TRANSFORMERS, {}).get("1")  # None: it took no part
    return {
        "tokens_per_second": by_streams,
        "ratio_to_transformers_serve": _ratio(by_streams[GATEWAY]["1"], peer), **rag,
    }  # fmt: skip


async def _by_itself(served: Served, sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """Return what the gateway adds to the first token, with no other server on the machine, and what its bounds do."""
    await _warm_up(served.gateway)
    first = await first_tokens(served, sizes.pairs, progress)
    loads = await under_load(served, sizes, progress)
    left = await mixed(served, sizes.requests, progress)
    rated, over = loads[str(RATED)], loads[str(OVERLOAD)]
    return {
        **first, "loads": loads, "overload_p99_ratio": _ratio(over["ttft_seconds"]["p99"], rated["ttft_seconds"]["p99"]),
        "refused_seconds_p99": over["refused_seconds"]["p99"],
        "leaked": left["leaked"], "memory_drift": left["memory_drift"], "mixed": left,
    }  # fmt: skip


async def throughput(targets: Mapping[str, Target], sizes: Sizes, progress: Progress) -> dict[str, dict[str, float]]:
    """Return tokens a second by contender and number of streams."""
    found: dict[str, dict[str, float]] = {name: {} for name in targets}
    done, total = 0, len(STREAMS) * sizes.turns * len(targets)
    for streams in STREAMS:
        tokens = dict.fromkeys(targets, 0)
        for turn in range(sizes.turns):
            for name in list(targets)[:: -1 if turn % 2 else 1]:
                tokens[name] += await _turn(targets[name], streams, sizes.window_seconds)
                done += 1
                progress("tokens a second", done, total)
        for name, number in tokens.items():
            found[name][str(streams)] = number / (sizes.window_seconds * sizes.turns)
    return found


async def ratio_to_engine(served: Served, sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """Return the share of the engine's tokens a second that the gateway keeps.

    It is the median over pairs of turns side by side, in which the machine was much the same, with their quartiles, by number of
    streams; and the mean of the medians. A pair says nothing if the engine, asked directly, gave no token in its turn.

    Raises:
        EngineError: no pair says anything.
    """
    import numpy as np

    sides = [(GATEWAY, served.gateway), (ENGINE, served.engine)]
    quartiles: dict[str, list[float]] = {}
    done, total = 0, len(STREAMS) * sizes.side_by_side
    for streams in STREAMS:
        ratios = []
        for pair in range(sizes.side_by_side):
            tokens = {}
            for name, target in sides[:: -1 if pair % 2 else 1]:
                tokens[name] = await _turn(target, streams, sizes.side_seconds)
            ratios.append(_ratio(tokens[GATEWAY], tokens[ENGINE]))
            done += 1
            progress("gateway and engine side by side", done, total)
        known = [ratio for ratio in ratios if ratio is not None]
        if not known:
            raise EngineError(f"the engine gave no token to {streams} streams in {sizes.side_seconds:g} s",
                              "a machine with time for it", "llmlab bench serve --seconds 10")  # fmt: skip
        quartiles[str(streams)] = np.percentile(known, (25, 50, 75)).tolist()
    medians = {streams: of[1] for streams, of in quartiles.items()}
    return {
        "tokens_ratio_to_engine": sum(medians.values()) / len(medians), "tokens_ratio_to_engine_by_streams": medians,
        "tokens_ratio_to_engine_quartiles": quartiles,
    }  # fmt: skip


async def first_tokens(served: Served, pairs: int, progress: Progress) -> dict[str, Any]:
    """Return the times to first token of engine and gateway, asked the same in turns, and what the gateway adds to them."""
    times: dict[str, list[float]] = {ENGINE: [], GATEWAY: []}
    body = story(2)
    async with client(served.engine) as to_engine, client(served.gateway) as to_gateway:
        sides = [(ENGINE, to_engine, served.engine), (GATEWAY, to_gateway, served.gateway)]
        for done in range(pairs):
            for name, http, target in sides[:: -1 if done % 2 else 1]:
                times[name].append(answered(await send(http, target, body)).ttft_seconds)
            progress("first token", done + 1, pairs)
    figures = {name: percentiles(of) for name, of in times.items()}
    return {"ttft_seconds": figures, "ttft_added_seconds": _of(figures[GATEWAY]["p50"]) - _of(figures[ENGINE]["p50"])}


async def questions_again(target: Target, documents: int, progress: Progress) -> dict[str, Any]:
    """Return the TTFT of a question asked again, and of another about the same document, over that of the first time.

    The first question about a document finds nothing of it in any cache. Each ratio is of medians over the documents.
    """
    cold: list[float] = []
    again: list[float] = []
    other: list[float] = []
    async with client(target) as http:
        for done, name in enumerate(DOCUMENTS[:documents]):
            first, second = (_question(name, text) for text in QUESTIONS)
            for times, body in ((cold, first), (again, first), (other, second)):
                times.append(answered(await send(http, target, body, RAG_PATH)).ttft_seconds)
            progress("questions asked again", done + 1, documents)
    usual = _of(percentiles(cold)["p50"])
    return {
        "cold_ttft_seconds": usual, "warm_ttft_ratio": _of(percentiles(again)["p50"]) / usual,
        "other_question_ttft_ratio": _of(percentiles(other)["p50"]) / usual,
    }  # fmt: skip


async def under_load(served: Served, sizes: Sizes, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the figures of the gateway by multiples of the rated load; its requests come as a Poisson process.

    Raises:
        EngineError: the engine gave no token while the load was to be rated.
    """
    seconds = max(sizes.load_seconds / 2, RATING_SECONDS)
    alone = await closed_loop(served.engine, partial(story, SHORT_REPLY_TOKENS), served.slots, seconds)
    rate = RATED_SHARE * tokens_within(alone, seconds) / seconds / SHORT_REPLY_TOKENS
    if not rate:
        raise EngineError(f"the engine gave no token in {seconds:g} s", "a machine with time for it", "llmlab bench serve again")
    found = {}
    for done, load in enumerate(sizes.loads):
        progress("loads", done, len(sizes.loads))
        await _idle(served)
        bodies = [story(SHORT_REPLY_TOKENS) for _ in range(max(1, round(rate * load * sizes.load_seconds)))]
        outcomes = await open_loop(served.gateway, bodies, rate * load, LOADS_SEED)
        found[str(load)] = {"rate": rate * load, **summary(outcomes, Limits())}
    progress("loads", len(sizes.loads), len(sizes.loads))
    return found


async def bench_endpoint(target: Target, rate: float, requests: int, reply_tokens: int, limits: Limits) -> dict[str, Any]:
    """Return the figures of any OpenAI endpoint under a load.

    Args:
        target: the endpoint; without a model the first one that it lists is asked.
        rate: requests a second; infinite sends all at once.
        requests: how many.
        reply_tokens: longest reply.
        limits: for goodput.

    Raises:
        EngineError: it does not answer, or completes none of the requests.
    """
    target = target if target.model else replace(target, model=await _first_model(target))
    outcomes = await open_loop(target, [story(reply_tokens) for _ in range(requests)], rate, LOADS_SEED)
    if not any(out.completed for out in outcomes):
        said = outcomes[0].error or outcomes[0].text[:300] or "nothing"
        raise EngineError(f"{target.url} completed none of {requests} requests; to the first it said: {said}",
                          "an OpenAI endpoint with streams", f"curl {target.url}/v1/models")  # fmt: skip
    return {"url": target.url, "model": target.model, "rate": rate if math.isfinite(rate) else None, **summary(outcomes, limits)}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw tokens a second by streams and contender, and the gateway's TTFT and throughput by load, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, by_streams in document["tokens_per_second"].items():
        left.plot(list(by_streams), list(by_streams.values()), marker="o", label=name)
    left.set(title=f"{document['model']}, closed loop", xlabel="streams", ylabel="tokens/s", ylim=(0, None))
    left.legend()
    loads = [(float(load), of) for load, of in document["loads"].items() if of["completed"]]
    for key in ("p50", "p99"):
        right.plot([load for load, _ in loads], [of["ttft_seconds"][key] for _, of in loads], marker="o", label=f"TTFT {key}")
    right.set(title="gateway, open loop", xlabel="times the rated load", ylabel="seconds", ylim=(0, None))
    rate = right.twinx()
    rate.plot([load for load, _ in loads], [of["request_throughput"] for _, of in loads], "k--", marker="s", label="completed")
    rate.set(ylabel="requests/s", ylim=(0, None))
    right.legend(handles=[*right.get_lines(), *rate.get_lines()])
    figure.savefig(path, dpi=120)


def _index(folder: Path, progress: Progress) -> None:
    """Index the pages that are asked about below a folder."""
    from pipelines.config import load, named
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import RagConfig, sync

    config = load(named("rag", "default"), RagConfig)
    progress("index", 0, 1)
    (folder / "pages").mkdir()
    for name in DOCUMENTS:
        shutil.copy(ROOT / "labs" / "knowledge" / f"{name}.md", folder / "pages")
    with indexes_in(folder / "index"):
        sync(folder / "pages", "knowledge", config, load_embedder(config.embedder))
    progress("index", 1, 1)


def _question(document: str, text: str) -> dict[str, Any]:
    return {"question": text.format(document), "where": f'source = "{document}.md"', "max_tokens": 4}


async def _turn(target: Target, streams: int, seconds: float) -> int:
    """Return how many tokens a server gives to so many streams, once it is done with what the turn before left behind."""
    await _warm_up(target)
    return tokens_within(await closed_loop(target, partial(story, REPLY_TOKENS), streams, seconds), seconds)


async def _warm_up(target: Target) -> None:
    async with client(target) as http:
        answered(await send(http, target, story(4)))


async def _idle(served: Served) -> None:
    """Wait until the engine is done with what others left behind: with one slot free, a short request is answered at once."""
    for _ in range(served.slots):
        await _warm_up(served.engine)


async def _first_model(target: Target) -> str:
    import httpx

    try:
        async with client(target) as http:
            reply = (await http.get("/v1/models")).raise_for_status().json()
            return str(reply["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{target.url}/v1/models lists no model ({type(error).__name__})", "an OpenAI endpoint",
                          f"curl {target.url}/v1/models, or --model NAME") from None  # fmt: skip


def _of(value: float | None) -> float:
    assert value is not None
    return value


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
