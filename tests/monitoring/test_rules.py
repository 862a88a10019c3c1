"""Rules: they name what exists, every alert has its page, a firing and a quiet case, and the objectives can be met and missed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import prometheus_server as ps
from monitoring import rules as generated
from monitoring.child_server import ProgramMissing
from monitoring.dashboards.serving import ENGINE_PANELS
from monitoring.metrics import GENERATION_TTFT, RAG_DURATION
from monitoring.objectives import BURNS, OBJECTIVES, RAG_SECONDS, TTFT_SECONDS
from tests.monitoring.conftest import ENGINE_NAMES

RUNBOOKS = ps.CONFIG.parents[1] / "runbooks"
CASES = sorted((Path(__file__).parent / "rules").glob("*.yml"))
RULE_FILES = [ps.CONFIG.parent / name for name in yaml.safe_load(ps.CONFIG.read_text(encoding="utf-8"))["rule_files"]]
ALERTS = {
    "LlmlabGatewayDown", "LlmlabEngineDown", "LlmlabQueueGrows", "LlmlabIndexStale", "LlmlabAbstentionRising", "LlmlabDiskFull",
    "LlmlabMemoryLow", "LlmlabTrainingStalled", "LlmlabTrainingDiverges", "LlmlabAvailabilityBurn", "LlmlabTtftBurn",
    "LlmlabRagLatencyBurn", "LlmlabCitationSupportBurn",
}  # fmt: skip


@pytest.fixture(scope="session")
def alerts(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for rule in rules if "alert" in rule]


def test_rules_name_only_series_that_exist(
    selected_names: Callable[[str], set[str]], rules: list[dict[str, Any]], known_names: set[str]
) -> None:
    used = [selected_names(rule["expr"]) for rule in rules if not rule["expr"].startswith("vector(")]
    assert all(used)
    assert set().union(*used) <= known_names | ENGINE_NAMES
    assert ENGINE_NAMES <= set().union(*used), "an engine's name that no rule reads"


def test_every_recorded_series_is_plotted_or_alerted(
    selected_names: Callable[[str], set[str]], rules: list[dict[str, Any]]
) -> None:
    from monitoring.dashboards.boards import BOARDS

    used = set().union(*(selected_names(expr) for board in BOARDS for _, expr in board.expressions()))
    used |= set().union(*(selected_names(rule["expr"]) for rule in rules if "alert" in rule))
    assert {rule["record"] for rule in rules if "record" in rule} <= used


def test_every_alert_says_what_to_do_and_has_its_page(alerts: list[dict[str, Any]]) -> None:
    assert {rule["alert"] for rule in alerts} == ALERTS == {path.stem for path in RUNBOOKS.glob("*.md")}
    for rule in alerts:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert len(rule["annotations"]["description"]) > 60
        assert rule["annotations"]["runbook_url"] == f"monitoring/runbooks/{rule['alert']}.md"


def test_pages_are_short_complete_and_their_links_lead_somewhere() -> None:
    titles = {plot.title for board in _boards() for plot in board.plots}
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.stem}: ") and len(text.splitlines()) < 40
        assert [part in text for part in ("**What it means.**", "**What to look at**", "**What to do**")] == [True] * 3
        assert all((RUNBOOKS / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", text))
        for board, quoted in re.findall(r"Board ([\w ]+): ((?:\"[^\"]+\"(?:,? ?(?:and )?)?)+)", text):
            assert board.lower() in {b.title.lower() for b in _boards()}, (path, board)
            assert set(re.findall(r"\"([^\"]+)\"", quoted)) <= titles, (path, quoted)


def test_every_alert_has_a_firing_and_a_quiet_case(alerts: list[dict[str, Any]]) -> None:
    tests = [test for path in CASES for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    fired = {(c["alertname"], a["exp_labels"]["severity"]) for c in cases for a in c["exp_alerts"]}
    assert fired == {(rule["alert"], rule["labels"]["severity"]) for rule in alerts}
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == ALERTS


def test_objectives_are_bounds_of_buckets_and_can_be_missed() -> None:
    for histogram, seconds in ((GENERATION_TTFT, TTFT_SECONDS), (RAG_DURATION, RAG_SECONDS)):
        (metric,) = histogram.describe()
        assert f'{metric.name}_bucket{{le="{seconds}"}}' in "".join(o.bad.format(w="1h") for o in OBJECTIVES)
        assert seconds in histogram._upper_bounds
    for objective in OBJECTIVES:
        assert all(burn.factor * objective.budget < 1 for burn in BURNS), "this alert could never fire"


def test_the_twelve_panels_have_rules_for_both_engines(selected_names: Callable[[str], set[str]]) -> None:
    engines: dict[str, set[str]] = {}
    for rule in generated.engine_rules():
        only = rule.get("labels", {}).get("engine")
        engines.setdefault(rule["record"], set()).update({only} if only else {"llamacpp", "provider"})
    assert len(ENGINE_PANELS) == 12
    for plot in ENGINE_PANELS:
        names = set().union(*(selected_names(query.expr.replace("$", "")) for query in plot.queries))
        assert names and all({"vllm", "llamacpp"} <= engines[name] for name in names), plot.title


def _boards() -> Any:
    from monitoring.dashboards.boards import BOARDS

    return BOARDS


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["check", "config", str(ps.CONFIG)], ["check", "rules", *map(str, RULE_FILES)], ["test", "rules", *map(str, CASES)]],
    ids=["check-config", "check-rules", "test-rules"],
)
def test_promtool_accepts(arguments: list[str]) -> None:
    try:
        promtool = ps.find_promtool()
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
