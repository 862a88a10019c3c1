"""The generated dashboard: the file on disk is what the code gives, and each panel can be acted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitoring import dashboards, metrics

EXPRESSIONS = list(dashboards.panel_expressions())
NAMES = [f"{number}-{title}" for number, (title, _) in enumerate(EXPRESSIONS)]


def panels() -> list[dict[str, Any]]:
    board = json.loads(dashboards.render()["overview.json"])
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_files_on_disk_are_the_generated_ones() -> None:
    assert dashboards.check() == [], "run: llmlab dashboards"


def test_write_then_check(tmp_path: Path) -> None:
    assert dashboards.check(tmp_path) == [tmp_path / "overview.json"]
    assert dashboards.write(tmp_path / "new") == [tmp_path / "new" / "overview.json"]
    assert dashboards.check(tmp_path / "new") == []


def test_check_names_changed_and_stale_files(tmp_path: Path) -> None:
    dashboards.write(tmp_path)
    (tmp_path / "overview.json").write_text("{}", encoding="utf-8")
    (tmp_path / "gone.json").write_text("{}", encoding="utf-8")
    assert dashboards.check(tmp_path) == [tmp_path / "overview.json", tmp_path / "gone.json"]


@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS, ids=NAMES)
def test_expressions_name_only_exported_series(title: str, expr: str, selected_names: Callable[[str], set[str]]) -> None:
    names = selected_names(expr)
    assert names, title
    assert names <= set().union(*metrics.series_names().values())


def test_every_query_of_the_json_is_listed() -> None:
    listed = [expr for _, expr in dashboards.panel_expressions(dashboards.WINDOW)]
    assert [target["expr"] for panel in panels() for target in panel["targets"]] == listed


def test_every_panel_has_a_unit_and_says_what_to_do() -> None:
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 40, panel["title"]


def test_panels_are_distinct_and_do_not_overlap() -> None:
    board = json.loads(dashboards.render()["overview.json"])["panels"]
    assert len({panel["id"] for panel in board}) == len({panel["title"] for panel in board}) == len(board)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in board)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_data_source_is_a_prometheus_variable() -> None:
    board = json.loads(dashboards.render()["overview.json"])
    assert [(v["name"], v["type"], v["query"]) for v in board["templating"]["list"]] == [
        ("datasource", "datasource", "prometheus")
    ]
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}
