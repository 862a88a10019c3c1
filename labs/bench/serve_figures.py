"""Figures of a load, in the terms of vLLM's benchmark: throughput, TTFT, TPOT, ITL, E2E and goodput.

    TTFT     from sending a request to its first token
    ITL      between two tokens of a reply that follow each other
    TPOT     of one reply: from the first token to the last, for each token after the first
    E2E      from sending a request to the end of its reply
    goodput  requests a second that keep every stated limit

Percentiles are of completed requests only, by linear interpolation; refused and failed requests are counted beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from labs.bench.serve_load import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Limits:
    """What a good request keeps, in seconds; infinity asks for nothing."""

    ttft_seconds: float = float("inf")
    tpot_seconds: float = float("inf")
    e2e_seconds: float = float("inf")


def summary(outcomes: Sequence[Outcome], limits: Limits) -> dict[str, Any]:
    """Return the figures of a load that ran to its end.

    Args:
        outcomes: of all requests that were sent.
        limits: for goodput.
    """
    done = [out for out in outcomes if out.completed]
    seconds = max((out.end for out in done), default=0.0) - min((out.sent for out in outcomes), default=0.0)
    good = [out for out in done if _keeps(out, limits)]
    tokens, prompts = sum(out.completion_tokens for out in done), sum(out.prompt_tokens for out in done)
    return {
        "requests": len(outcomes), "completed": len(done), "refused": sum(out.refused for out in outcomes),
        "server_errors": sum(out.failed for out in outcomes), "seconds": max(seconds, 0.0),
        "request_throughput": _rate(len(done), seconds), "output_throughput": _rate(tokens, seconds),
        "total_token_throughput": _rate(tokens + prompts, seconds),
        "goodput": _rate(len(good), seconds),
        "ttft_seconds": percentiles([out.ttft_seconds for out in done if out.token_times]),
        "tpot_seconds": percentiles([tpot(out) for out in done if len(out.token_times) > 1]),
        "itl_seconds": percentiles([b - a for out in done for a, b in pairwise(out.token_times)]),
        "e2e_seconds": percentiles([out.end - out.sent for out in done]),
        "refused_seconds": percentiles([out.end - out.sent for out in outcomes if out.refused]),
    }  # fmt: skip


def tpot(outcome: Outcome) -> float:
    """Return the seconds for each token after the first; 0 for a reply of one."""
    times = outcome.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, p50, p90 and p99; None for no values."""
    import numpy as np

    if not values:
        return dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES)))
    found = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(np.mean(values)), **{f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}}


def tokens_within(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Return how many tokens came in the first seconds of a closed loop, of finished and unfinished replies."""
    end = min((out.sent for out in outcomes), default=0.0) + seconds
    return sum(time <= end for out in outcomes for time in out.token_times)


def _keeps(out: Outcome, limits: Limits) -> bool:
    fast = out.ttft_seconds <= limits.ttft_seconds and tpot(out) <= limits.tpot_seconds
    return fast and out.end - out.sent <= limits.e2e_seconds


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
