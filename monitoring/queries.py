"""Questions to a running Prometheus, over its HTTP API; it starts none (see `monitoring.prometheus_server`)."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

SECONDS = 10.0  # for one answer
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoAnswer(RuntimeError):
    """Prometheus cannot be reached, or refuses the expression; the message says which."""


@dataclass(frozen=True)
class Series:
    """One series: its labels, and its points as (Unix time, value) without those that are no number."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def over_time(url: str, expr: str, start: float, end: float, step: float) -> list[Series]:
    """Return what an expression gave from `start` to `end`, in Unix time, each `step` seconds; `NoAnswer` if it cannot be had."""
    found = _ask(url, "query_range", {"query": expr, "start": start, "end": end, "step": step})
    return [series for one in found if (series := Series(one["metric"], _numbers(one["values"]))).points]


def now(url: str, expr: str) -> list[Series]:
    """Return what an expression gives now; `NoAnswer` if it cannot be had."""
    found = _ask(url, "query", {"query": expr})
    return [series for one in found if (series := Series(one["metric"], _numbers([one["value"]]))).points]


def _ask(url: str, what: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        with _DIRECT.open(f"{url.rstrip('/')}/api/v1/{what}?{urllib.parse.urlencode(parameters)}", timeout=SECONDS) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"Prometheus refuses {parameters['query']!r}: {error.read(500).decode(errors='replace')}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoAnswer(f"no Prometheus answers at {url} ({getattr(error, 'reason', error)})") from None


def _numbers(values: list[tuple[float, str]]) -> list[tuple[float, float]]:
    return [(at, number) for at, text in values if math.isfinite(number := float(text))]
