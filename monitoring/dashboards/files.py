"""The boards as Grafana's JSON, and the generated rules, on disk: written, committed, and compared in the tests.

Nothing here talks to Grafana, which reads the files by its provisioning. Run by: llmlab dashboards [--check]
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, BigValueTextMode, GraphTresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring import rules
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.plots import Board, Plot, Variable

DIRECTORY = Path(__file__).parents[1]
JSON_FOLDER = "grafana/dashboards"
DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 8
ALL = ".*"


def rendered() -> dict[str, str]:
    """Return the text of every generated file by its path below `DIRECTORY`; the same declarations always give the same text."""
    boards = {f"{JSON_FOLDER}/{board.name}.json": _json(board) for board in BOARDS}
    return boards | {f"prometheus/{name}": text for name, text in rules.rendered().items()}


def write(directory: Path = DIRECTORY) -> list[Path]:
    """Write every generated file below `directory`, which is created if need be; return the files."""
    written = []
    for name, text in rendered().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def check(directory: Path = DIRECTORY) -> list[Path]:
    """Return the files below `directory` that are missing, differ from what `write` gives, or are stale."""
    wanted = {directory / name: text for name, text in rendered().items()}
    stale = [path for path in sorted((directory / JSON_FOLDER).glob("*.json")) if path not in wanted]
    return [path for path, text in wanted.items() if _read(path) != text] + stale


def _json(board: Board) -> str:
    return json.dumps(_built(board).build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _built(board: Board) -> dashboard.Dashboard:
    built = (
        dashboard.Dashboard(f"LLM Lab: {board.title}")
        .uid(f"llmlab-{board.name}")
        .description(board.description)
        .tags(["llmlab", "generated"])
        .readonly()
        .refresh("5s")
        .time("now-30m", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .link(dashboard.DashboardLink("LLM Lab").type(DashboardLinkType.DASHBOARDS).tags(["llmlab"]).keep_time(True))
    )
    for variable in board.variables:
        built.with_variable(_variable(variable))
    number = 0
    for title, plots in board.sections.items():
        number += 1
        built.with_row(dashboard.Row(title).id(number))
        for plot in plots:
            number += 1
            built.with_panel(_panel(plot).id(number))
    return built


def _variable(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATA_SOURCE)
        .query(f"label_values({variable.series}, {variable.name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
    )


def _panel(plot: Plot) -> timeseries.Panel | stat.Panel | heatmap.Panel:
    panel = {"line": _lines, "heat": _heat}.get(plot.kind, _stat)(plot)
    panel.title(plot.title).description(plot.description).unit(plot.unit).datasource(DATA_SOURCE)
    panel.height(PANEL_HEIGHT).span(plot.width)
    for number, query in enumerate(plot.queries):
        target = prometheus.Dataquery().ref_id("ABCDEFGH"[number]).expr(query.expr).legend_format(query.legend)
        if plot.kind == "heat":
            target.format(PromQueryFormat.HEATMAP)
        panel.with_target(target if plot.kind in ("line", "heat") else target.instant())
    return panel


def _lines(plot: Plot) -> timeseries.Panel:
    panel = timeseries.Panel().fill_opacity(10).min(0)
    if plot.limit is not None:
        steps = [Threshold(value=None, color="green"), Threshold(value=plot.limit, color="red")]
        panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.LINE))
    return panel


def _heat(plot: Plot) -> heatmap.Panel:  # noqa: ARG001 - one form for each kind
    return heatmap.Panel().calculate(False)


def _stat(plot: Plot) -> stat.Panel:
    text = BigValueTextMode.NAME if plot.kind == "name" else BigValueTextMode.VALUE_AND_NAME
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().graph_mode(BigValueGraphMode.NONE).text_mode(text).reduce_options(last)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
