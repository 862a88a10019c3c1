"""The generated boards: the files on disk are what the code gives, Grafana's model reads them, each panel can be acted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from grafana_foundation_sdk.models.dashboard import Panel as PanelModel

from monitoring.dashboards import files
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.plots import WINDOW, Board

EXPRESSIONS = [(board.name, title, expr) for board in BOARDS for title, expr in board.expressions()]
EVERY = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def read(board: Board) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files.rendered()[f"{files.JSON_FOLDER}/{board.name}.json"])
    return found


def panels(board: Board) -> list[dict[str, Any]]:
    return [panel for panel in read(board)["panels"] if panel["type"] != "row"]


def test_the_five_boards() -> None:
    assert [board.name for board in BOARDS] == ["overview", "serving", "rag", "training", "hardware"]


def test_files_on_disk_are_the_generated_ones() -> None:
    assert files.check() == [], "run: llmlab dashboards"


def test_write_then_check_names_changed_and_stale_files(tmp_path: Path) -> None:
    assert len(files.check(tmp_path)) == len(files.rendered()) == 7
    written = files.write(tmp_path / "new")
    assert files.check(tmp_path / "new") == []
    written[0].write_text("{}", encoding="utf-8")
    stale = written[0].with_name("gone.json")
    stale.write_text("{}", encoding="utf-8")
    assert files.check(tmp_path / "new") == [written[0], stale]


@pytest.mark.parametrize(("board", "title", "expr"), EXPRESSIONS, ids=[f"{b}-{t}-{n}" for n, (b, t, _) in enumerate(EXPRESSIONS)])
def test_expressions_name_only_series_that_exist(
    board: str, title: str, expr: str, selected_names: Callable[[str], set[str]], known_names: set[str]
) -> None:
    names = selected_names(expr)
    assert names, (board, title)
    assert names <= known_names


@EVERY
def test_every_query_of_the_json_is_listed(board: Board) -> None:
    listed = [query.expr for plot in board.plots for query in plot.queries]
    assert [target["expr"] for panel in panels(board) for target in panel["targets"]] == listed


@EVERY
def test_the_models_of_the_sdk_read_what_was_written(board: Board) -> None:
    """Grafana's schema is not packaged; the SDK's models are made from it, so nothing may be lost on the way through them."""
    written = read(board)
    text = json.dumps(Dashboard.from_json(written), cls=JSONEncoder)
    known = json.loads(text)
    for panel in written["panels"]:
        if panel["type"] != "row":
            again = json.loads(json.dumps(PanelModel.from_json(panel), cls=JSONEncoder))
            assert set(panel) <= set(again), panel["title"]
    assert {key: known[key] for key in ("uid", "title", "templating", "time", "refresh", "links")} == {
        key: written[key] for key in ("uid", "title", "templating", "time", "refresh", "links")
    }


@EVERY
def test_every_panel_has_a_unit_and_says_what_to_do(board: Board) -> None:
    for panel in panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 60, panel["title"]


@EVERY
def test_panels_are_distinct_and_do_not_overlap(board: Board) -> None:
    found = read(board)["panels"]
    assert len({panel["id"] for panel in found}) == len({panel["title"] for panel in found}) == len(found)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in found)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@EVERY
def test_variables_are_used_and_have_values(board: Board, known_names: set[str]) -> None:
    listed = {v["name"]: v for v in read(board)["templating"]["list"]}
    assert listed.pop("datasource")["query"] == "prometheus"
    assert set(listed) == {variable.name for variable in board.variables}
    expressions = [query.expr for plot in board.plots for query in plot.queries]
    for variable in board.variables:
        assert any(f"${variable.name}" in expr for expr in expressions)
        assert variable.series in known_names
    assert {panel["datasource"]["uid"] for panel in panels(board)} == {"${datasource}"}
    assert not [expr for _, expr in board.expressions() if "$" in expr.replace("$1", "")], WINDOW
