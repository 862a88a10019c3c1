"""What a board is made of: sections of plots, each with its queries, unit and what a reader does about a bad value.

The PromQL is put together here from declared metrics, so a renamed metric renames its plots. It knows nothing of Grafana's JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

from monitoring import metrics as m

# Grafana replaces it with at least four scrape intervals, so that a rate always has samples.
WINDOW = "$__rate_interval"
_LABEL = re.compile(r"\{\{(\w+)\}\}")
Metric = Counter | Gauge | Histogram


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expr: str
    legend: str

    def name(self, labels: Mapping[str, str]) -> str:
        """Return the legend of a series with these labels."""
        return _LABEL.sub(lambda found: labels.get(found[1], ""), self.legend).strip()


@dataclass(frozen=True)
class Plot:
    """One panel: what it shows, in which unit, and what a reader does about a bad value.

    Attributes:
        kind: "line", "value", "name" (the legend instead of a value) or "heat" (one query of buckets, by `le`).
        width: in columns of Grafana's 24.
        limit: a value that should not be passed; drawn as a line.
    """

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    kind: Literal["line", "value", "name", "heat"] = "line"
    width: int = 6
    limit: float | None = None


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a board: the values of a label of a series; all of them until somebody chooses."""

    name: str
    label: str
    series: str


@dataclass(frozen=True)
class Board:
    """One dashboard.

    Attributes:
        name: of its file, and of its address after "llmlab-".
        sections: rows of plots, by title.
        variables: beside the data source, which every board has.
    """

    name: str
    title: str
    description: str
    sections: Mapping[str, tuple[Plot, ...]]
    variables: tuple[Variable, ...] = field(default=())

    @property
    def plots(self) -> tuple[Plot, ...]:
        """Return the plots of all sections."""
        return tuple(plot for plots in self.sections.values() for plot in plots)

    def expressions(self, window: str = "1m") -> Iterator[tuple[str, str]]:
        """Yield (title of the plot, PromQL) of every query, with `window` and all values in the place of Grafana's variables."""
        for plot in self.plots:
            for query in plot.queries:
                yield plot.title, self.filled(query.expr, window)

    def filled(self, expr: str, window: str) -> str:
        """Return an expression as Grafana would send it, with every variable at "all"."""
        expr = expr.replace(WINDOW, window)
        for variable in self.variables:
            expr = expr.replace(f"${variable.name}", ".*")
        return expr


def rate(metric: Counter, by: str = "", where: str = "") -> str:
    """Return the PromQL for events per second of a counter, summed by the labels `by`."""
    return f"sum{_by(by)}(rate({m.series_name(metric)}{_where(where)}[{WINDOW}]))"


def increase(metric: Counter, time: str, by: str = "", where: str = "") -> str:
    """Return the PromQL for events within `time`, such as "1h", summed by the labels `by`."""
    return f"sum{_by(by)}(increase({m.series_name(metric)}{_where(where)}[{time}]))"


def total(metric: Gauge, by: str = "", where: str = "") -> str:
    """Return the PromQL for the sum of a gauge by the labels `by`."""
    return f"sum{_by(by)}({m.series_name(metric)}{_where(where)})"


def quantile(fraction: float, metric: Histogram, by: str = "", where: str = "") -> str:
    """Return the PromQL for a quantile (0 to 1) of a histogram, by the labels `by`."""
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({m.series_name(metric)}_bucket{_where(where)}[{WINDOW}])"
    return f"histogram_quantile({fraction}, sum by ({labels}) ({buckets}))"


def mean(metric: Histogram, where: str = "") -> str:
    """Return the PromQL for the mean observation of a histogram."""
    name, matcher = m.series_name(metric), _where(where)
    return f"sum(rate({name}_sum{matcher}[{WINDOW}])) / sum(rate({name}_count{matcher}[{WINDOW}]))"


def share(metric: Counter, where: str, among: str = "") -> str:
    """Return the PromQL for the share (0 to 1) of a counter's events matching `where` among `among`; NaN without events."""
    chosen = ", ".join(part for part in (among, where) if part)
    return f"({rate(metric, where=chosen)} or vector(0)) / {rate(metric, where=among)}"


def p50_p95(metric: Histogram, by: str = "", where: str = "") -> tuple[Query, ...]:
    """Return the queries for the median and the 95th percentile."""
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(Query(quantile(q, metric, by, where), f"p{q * 100:.0f}{legend}") for q in (0.5, 0.95))


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


def _where(matcher: str) -> str:
    return f"{{{matcher}}}" if matcher else ""
