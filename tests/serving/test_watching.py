"""The contract of the dashboards, on the live stack: gateway, engine, training and Prometheus are real, and so is the load.

Every query of every panel, and every series that a rule reads or records, returns data, or is listed below with the reason.
"""

from __future__ import annotations

import contextlib
import html
import json
import signal
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from monitoring import metrics, queries
from monitoring import prometheus_server as ps
from monitoring.child_server import ProgramMissing
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.draw import draw
from serving.launch import Running
from tests.labs.test_metered import address, place, train  # noqa: F401 - fixtures
from tests.monitoring.conftest import BUILT_IN, ENGINE_NAMES
from tests.monitoring.test_prometheus import free_address
from tests.serving.conftest import MODEL, TUNED, descendants, metric, wait_until

CHAT = {"messages": [{"role": "user", "content": "Write the numbers from one to twenty."}], "max_tokens": 8, "temperature": 0}
NEEDS_GPU = "llmlab_gpu_"  # series of these are absent without one
NEEDS_VLLM = "vllm:"  # tests/serving/test_vllm_gateway.py holds its metrics against these names
NEEDS_ALERT = "ALERTS"  # exists only while an alert fires; the panel falls back to 0
NEEDS_PROVIDER = 'engine="provider"'


def labelled(rule: dict[str, Any]) -> str:
    """Return a query for what a recording rule records."""
    labels = ", ".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
    return f"{rule['record']}{{{labels}}}"


def selectors(expr: str) -> list[str]:
    """Return each series that an expression reads, with its matchers, as it is now."""
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            matchers = ", ".join(f"{m.name}{_SIGNS[str(m.op)]}{json.dumps(m.value)}" for m in node.matchers.matchers)
            found.append(f"{node.name}{{{matchers}}}")
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


_SIGNS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


def wanted() -> dict[str, str]:
    """Return every query that has to return data, with the panel or rule that needs it."""
    found = {expr: f"{board.name}: {title}" for board in BOARDS for title, expr in board.expressions("30s")}
    for name in yaml.safe_load(ps.CONFIG.read_text(encoding="utf-8"))["rule_files"]:
        content = yaml.safe_load((ps.CONFIG.parent / name).read_text(encoding="utf-8"))
        for rule in (rule for group in content["groups"] for rule in group["rules"]):
            if "record" in rule and NEEDS_VLLM not in rule["expr"] and NEEDS_PROVIDER not in rule["expr"]:
                found[labelled(rule)] = rule["record"]
            if "alert" in rule:
                found |= {selector: rule["alert"] for selector in selectors(rule["expr"])}
    return {expr: where for expr, where in found.items() if not expr.startswith(f"max by (gpu) ({NEEDS_GPU}")}


def load(http: httpx.Client) -> None:
    """Do once what users do, and what goes wrong for them."""
    for model in (MODEL, TUNED):
        http.post("/v1/chat/completions", json=CHAT | {"model": model, "stream": True}).raise_for_status()
        for question in ("Who made Vela?", 'Repeat this sentence: "Vela was made by Orion Labs [1]."'):
            http.post("/v1/rag/query", json={"question": question, "model": model, "max_tokens": 16}).raise_for_status()
    assert http.post("/v1/chat/completions", json=CHAT | {"model": MODEL, "max_tokens": 10**6}).status_code == 400
    with http.stream("POST", "/v1/chat/completions", json=CHAT | {"model": MODEL, "stream": True, "max_tokens": 500}) as reply:
        next(reply.iter_lines())


def fail(http: httpx.Client, served: Running) -> None:
    """Kill the engine, ask it something, and wait until it is back."""
    process = served.service.supervisor._process
    assert process
    descendants(process.pid)[0].kill()
    wait_until(lambda: http.post("/v1/chat/completions", json=CHAT | {"model": MODEL}).status_code == 503)
    wait_until(lambda: http.get("/readyz").status_code == 200)


@contextlib.contextmanager
def prometheus(gateway: str, training: str, folder: Path) -> Iterator[ps.PrometheusServer]:
    try:
        program = ps.find_prometheus()
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    config = ps.resolve_config(folder / "config", gateway, training, scrape_seconds=1)
    with ps.PrometheusServer(config, folder / "data", free_address(), program) as server:
        yield server


@pytest.mark.slow
def test_every_panel_and_rule_shows_something(
    lab: Running,
    http: httpx.Client,
    train: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
    report_figure: Callable[[str], None],
) -> None:
    launched = lab.service.supervisor.launch
    metrics.set_engine("llamacpp", "it was asked for", launched.slots)  # another gateway of this process may have set its own
    training = train(0, steps=5_000)
    at = urllib.parse.urlsplit(address(training)).netloc
    with prometheus(urllib.parse.urlsplit(lab.url).netloc, at, tmp_path) as server:
        assert len(wanted()) > 150
        of_training = {expr: where for expr, where in wanted().items() if "llmlab_training_" in expr}
        others = {expr: where for expr, where in wanted().items() if expr not in of_training}
        assert empty_after(120, of_training, server.url, lambda: time.sleep(0.2)) == {}
        training.send_signal(signal.SIGINT)  # beside it each answer would wait for a processor
        training.communicate(timeout=60)
        before = {reason: metric(http, "llmlab_cost_dollars_total", kind=reason) for reason in metrics.TOKEN_KINDS}
        load(http)
        fail(http, lab)
        assert empty_after(120, others, server.url, lambda: load(http)) == {}
        check_names(http, server.url)
        check_outcomes(http, before)
        check_pictures(server.url, tmp_path)
        scrapes = queries.now(server.url, 'max_over_time(scrape_duration_seconds{job="llmlab-gateway"}[1m])')
        report_figure(f"longest scrape of the gateway under load: {scrapes[0].points[0][1] * 1000:.0f} ms")


def empty_after(seconds: float, queries_of: dict[str, str], url: str, between: Callable[[], None]) -> dict[str, str]:
    """Return the queries that have returned nothing within the time, asking again after each call of `between`."""
    deadline = time.monotonic() + seconds
    while queries_of and time.monotonic() < deadline:
        between()
        queries_of = {expr: where for expr, where in queries_of.items() if not queries.now(url, expr)}
    return queries_of


def check_names(http: httpx.Client, url: str) -> None:
    """Everything that is named anywhere is exported by somebody; and all that is ours is declared."""
    stored = {series.labels["__name__"] for series in queries.now(url, 'last_over_time({__name__=~".+"}[10m])')}
    named = {name for name in BUILT_IN | ENGINE_NAMES if not name.startswith((NEEDS_VLLM, NEEDS_ALERT))}
    assert named <= stored
    ours = {name for name in stored if name.startswith(metrics.PREFIX)}
    declared = set().union(*metrics.series_names().values())
    assert ours == {n for n in declared if not n.startswith(NEEDS_GPU)}
    text = http.get("/metrics/engine").text
    engine = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {name for name in ENGINE_NAMES if name.startswith("llamacpp:")} <= engine


def check_outcomes(http: httpx.Client, before: dict[str, float]) -> None:
    for outcome in metrics.GENERATION_OUTCOMES:
        assert metric(http, "llmlab_generation_requests_total", model=MODEL, outcome=outcome) > 0, outcome
    assert metric(http, "llmlab_generation_finished_total", model=MODEL, reason="length") > 0
    assert all(metric(http, "llmlab_cost_dollars_total", kind=kind) > dollars for kind, dollars in before.items())


def check_pictures(url: str, folder: Path) -> None:
    """Every board can be drawn as it is, in both forms."""
    for board in BOARDS:
        with Image.open(draw(board, url, 60, folder / f"{board.name}.png")) as picture:
            assert picture.width == 1200 and picture.height > 400
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    page = draw(BOARDS[0], url, 60, folder / "overview.html").read_text(encoding="utf-8")
    assert page.count('<img alt="') == len(BOARDS[0].sections) and all(
        html.escape(plot.title) in page for plot in BOARDS[0].plots
    )
