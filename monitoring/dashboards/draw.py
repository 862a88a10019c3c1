"""Draw a board from a running Prometheus, with the panels that Grafana would show, for people without one.

A PNG of the whole board, or one HTML file with a picture of each section and what a bad value means. It draws the last minutes
once and does not refresh itself. Run by:

    llmlab dashboards render overview --since 30m -o overview.png
"""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring import queries
from monitoring.dashboards.plots import Board, Plot, Query

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 24
INCHES_WIDE, INCHES_A_ROW, INCHES_OF_VALUES, INCHES_A_HEAD = 16.0, 2.35, 1.35, 0.4
DPI = 75
COLOURS = 96  # of the file, which is a third as large so
POINTS = 120
LEAST_STEP, LEAST_WINDOW = 1.0, 10.0  # seconds
SHOWN_SERIES, SHOWN_CHARS = 7, 46
CHARS_A_COLUMN, LARGE_CHARS_A_COLUMN = 8, 5  # of the text of a value
NO_DATA = "no data"


def draw(board: Board, prometheus: str, seconds: float, to: Path) -> Path:
    """Write a picture of the last `seconds` of a board, as HTML if `to` ends so, else as PNG; return its path.

    Raises:
        NoAnswer: there is no Prometheus at that address, or it refuses an expression.
    """
    when = _Span(prometheus, seconds)
    if to.suffix == ".html":
        to.write_text(_page(board, when), encoding="utf-8")
    else:
        to.write_bytes(_png(_figure(board, board.sections, when)))
    return to


class _Span:
    """The time that is drawn, and where it is asked for."""

    def __init__(self, prometheus: str, seconds: float) -> None:
        self.prometheus, self.end = prometheus, time.time()
        self.start = self.end - seconds
        self.step = max(LEAST_STEP, seconds / POINTS)
        self.window = f"{max(LEAST_WINDOW, 4 * self.step, 20.0):.0f}s"  # as Grafana: four scrapes at least

    def of(self, board: Board, query: Query) -> list[queries.Series]:
        expr = board.filled(query.expr, self.window)
        return queries.over_time(self.prometheus, expr, self.start, self.end, self.step)

    def newest(self, board: Board, query: Query) -> list[queries.Series]:
        return queries.now(self.prometheus, board.filled(query.expr, self.window))


def _figure(board: Board, sections: Mapping[str, tuple[Plot, ...]], when: _Span) -> Figure:
    from matplotlib.figure import Figure

    placed, high = _placed(sections)
    figure = Figure(figsize=(INCHES_WIDE, high), facecolor="white")
    for what, left, top in placed:
        if isinstance(what, str):
            figure.text(0.012, 1 - (top + 0.28) / high, what, fontsize=12, weight="bold", color="#333333")
            continue
        tall = _tall(what)
        x, y = left / COLUMNS + 0.032, 1 - (top + tall - 0.35) / high
        axes = figure.add_axes((x, y, what.width / COLUMNS - 0.044, (tall - 0.75) / high))
        suffix = what.unit.partition("suffix: ")[2]
        axes.set_title(f"{what.title} ({suffix})" if suffix else what.title, fontsize=9, loc="left", color="#222222")
        {"line": _draw_lines, "heat": _draw_heat}.get(what.kind, _draw_values)(axes, board, what, when)
    return figure


def _placed(sections: Mapping[str, tuple[Plot, ...]]) -> tuple[list[tuple[str | Plot, int, float]], float]:
    """Return heads and plots with their left column and the inches above them, and the inches of all."""
    placed: list[tuple[str | Plot, int, float]] = []
    top = 0.0
    for title, plots in sections.items():
        placed.append((title, 0, top))
        top += INCHES_A_HEAD
        left, tallest = 0, 0.0
        for plot in plots:
            if left + plot.width > COLUMNS:
                left, top, tallest = 0, top + tallest, 0.0
            placed.append((plot, left, top))
            left, tallest = left + plot.width, max(tallest, _tall(plot))
        top += tallest
    return placed, top


def _tall(plot: Plot) -> float:
    """Return the inches of a plot with its title; a value needs fewer."""
    return INCHES_OF_VALUES if plot.kind in ("value", "name") else INCHES_A_ROW


def _draw_lines(axes: Any, board: Board, plot: Plot, when: _Span) -> None:
    drawn = [(series, query.name(series.labels)) for query in plot.queries for series in when.of(board, query)]
    drawn.sort(key=lambda one: -max(value for _, value in one[0].points))
    for number, (series, name) in enumerate(drawn):
        shown = name[:SHOWN_CHARS] if number < SHOWN_SERIES else "_"
        axes.plot([at for at, _ in series.points], [v for _, v in series.points], linewidth=1.2, label=shown)
    if not drawn:
        _say(axes, [NO_DATA])
        return
    highest = max(value for series, _ in drawn for _, value in series.points)
    if plot.limit is not None and plot.limit <= 4 * highest:
        axes.axhline(plot.limit, color="#cc2222", linewidth=0.8, linestyle="--")
        highest = max(highest, plot.limit)
    axes.set_ylim(0, highest * 1.15 or 1)
    _dress(axes, plot, when)
    axes.legend(fontsize=6.5, loc="upper left", framealpha=0.6, ncols=2, handlelength=1, borderpad=0.2, labelspacing=0.2)


def _draw_heat(axes: Any, board: Board, plot: Plot, when: _Span) -> None:
    """Draw how many observations fell between each two bounds, over time."""
    import numpy as np

    found = sorted(when.of(board, plot.queries[0]), key=lambda series: float(series.labels["le"]))
    times = sorted({at for series in found for at, _ in series.points})
    if not times:
        _say(axes, [NO_DATA])
        return
    column = {at: number for number, at in enumerate(times)}
    below = np.zeros((len(found), len(times)))
    for row, series in enumerate(found):
        for at, value in series.points:
            below[row, column[at]] = value
    counts = np.diff(below, axis=0, prepend=0.0)
    axes.pcolormesh(times, range(len(found)), counts, cmap="Blues", shading="nearest")
    axes.set_yticks(range(len(found)), [f"{series.labels['le'].removesuffix('.0')}" for series in found])
    _dress(axes, plot, when, heat=True)


def _draw_values(axes: Any, board: Board, plot: Plot, when: _Span) -> None:
    lines = []
    for query in plot.queries:
        for series in when.newest(board, query):
            name = query.name(series.labels)
            lines.append(name if plot.kind == "name" else f"{name}  {said(series.points[-1][1], plot.unit)}".strip())
    _say(axes, lines or [NO_DATA], plot.width)


def _say(axes: Any, lines: list[str], width: int = COLUMNS) -> None:
    """Write lines in the middle, large if there is one that is short."""
    axes.set_axis_off()
    chars = CHARS_A_COLUMN * width
    shown = [line[i : i + chars] for line in lines[:4] for i in range(0, min(len(line), 3 * chars), chars)]
    size = 13 if len(shown) == 1 and len(shown[0]) <= LARGE_CHARS_A_COLUMN * width else 8.5 if len(shown) < 4 else 6.5
    axes.text(0.5, 0.5, "\n".join(shown), ha="center", va="center", fontsize=size, transform=axes.transAxes, color="#1f60c4")


def _dress(axes: Any, plot: Plot, when: _Span, *, heat: bool = False) -> None:
    axes.set_xlim(when.start, when.end)
    parts, form = max(3, plot.width // 2), "%H:%M" if when.end - when.start > 600 else "%H:%M:%S"
    ticks = [when.start + (when.end - when.start) * part / parts for part in range(parts + 1)][1:-1]
    axes.set_xticks(ticks, [f"{datetime.fromtimestamp(at):{form}}" for at in ticks])
    axes.tick_params(labelsize=6.5, length=2)
    axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not heat:
        unit = "short" if plot.unit.startswith("suffix:") else plot.unit  # the title has it
        axes.yaxis.set_major_formatter(lambda value, _: said(value, unit))


def said(value: float, unit: str) -> str:
    """Return a value with its unit of Grafana, such as "1.2 GB" for 1.2e9 and "bytes"."""
    if unit == "bool_yes_no":
        return "yes" if value else "no"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "currencyUSD":
        return f"${value:.3g}"
    if unit == "s":
        return _time(value)
    if unit == "bytes":
        return _short(value) + "B"
    words = {"reqps": "/s", "watt": " W", "celsius": " °C"}
    return _short(value).strip() + (words.get(unit) or unit.partition("suffix:")[2].rstrip())


def _time(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{seconds * 1000:.3g} ms"


def _short(value: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if name == 'k' else size):.3g} {name}"
    return f"{value:.4g} "


def _png(figure: Figure) -> bytes:
    """Return a figure as PNG of few colours."""
    from PIL import Image

    drawn, made = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(made, "PNG", optimize=True)
    return made.getvalue()


def _page(board: Board, when: _Span) -> str:
    """Return one HTML file that holds everything."""
    shown = f"{datetime.fromtimestamp(when.start):%Y-%m-%d %H:%M} to {datetime.fromtimestamp(when.end):%H:%M}"
    parts = [f"<h1>LLM Lab: {html.escape(board.title)}</h1><p>{html.escape(board.description)} {shown}.</p>"]
    for title, plots in board.sections.items():
        picture = base64.b64encode(_png(_figure(board, {title: plots}, when))).decode()
        told = "".join(f"<dt>{html.escape(plot.title)}</dt><dd>{html.escape(plot.description)}</dd>" for plot in plots)
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{picture}"><dl>{told}</dl>')
    style = "body{font-family:sans-serif;max-width:1240px;margin:auto}img{width:100%}dt{font-weight:bold}dd{margin:0 0 .5em 1em}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>LLM Lab: {html.escape(board.title)}</title>'
    return f"{head}<style>{style}</style>{''.join(parts)}</html>\n"
