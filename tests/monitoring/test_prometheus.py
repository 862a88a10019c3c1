"""Configuration, rules, Compose file, and a real Prometheus that answers the panels' queries."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import start_http_server

from monitoring import dashboards, metrics
from monitoring import prometheus_server as ps
from monitoring.exporter import Exporter

MONITORING = ps.CONFIG.parent.parent
COMPOSE = MONITORING / "compose.yaml"
RULES_TEST = Path(__file__).parent / "rules_test.yml"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def binary(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except ps.PrometheusMissing as missing:
        pytest.skip(str(missing))


# --- files ---------------------------------------------------------------------------------------


def test_rules_name_only_series_that_exist(selected_names: Callable[[str], set[str]], rules: list[dict[str, Any]]) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    known = set().union(*metrics.series_names().values()) | recorded | {"up"}
    for rule in rules:
        names = selected_names(rule["expr"])
        assert names
        assert names <= known


def test_every_alert_says_what_to_do(rules: list[dict[str, Any]]) -> None:
    alerts = [rule for rule in rules if "alert" in rule]
    assert len(alerts) == 5
    for rule in alerts:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert len(rule["annotations"]["description"]) > 40


def test_grafana_uses_the_scrape_interval_and_address() -> None:
    source = load(MONITORING / "grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["jsonData"]["timeInterval"] == load(ps.CONFIG)["global"]["scrape_interval"] == "5s"
    assert source["url"] == f"http://{ps.LISTEN}"


def test_grafana_reads_the_mounted_dashboards() -> None:
    path = load(MONITORING / "grafana/provisioning/dashboards/llmlab.yaml")["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{path}:ro" in load(COMPOSE)["services"]["grafana"]["volumes"]


def test_compose_file_is_valid() -> None:
    check = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run([sys.executable, "-m", *check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_listens_on_loopback_only() -> None:
    services = load(COMPOSE)["services"]
    assert set(services) == {"prometheus", "grafana"}
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    assert f"--web.listen-address={ps.LISTEN}" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_compose_pins_images_and_mounts_files_read_only() -> None:
    for service in load(COMPOSE)["services"].values():
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        mounts = [volume for volume in service["volumes"] if volume.startswith("./")]
        assert mounts
        for volume in mounts:
            assert volume.endswith(":ro")
            assert (MONITORING / volume.split(":")[0]).is_dir()


def test_grafana_requires_a_password() -> None:
    environment = load(COMPOSE)["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


# --- finding and configuring ---------------------------------------------------------------------


def executable(path: Path, script: str = "exit 0") -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_argument_wins_over_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, other = executable(tmp_path / "named"), executable(tmp_path / "other")
    monkeypatch.setenv("PROMETHEUS", str(other))
    assert ps.find_prometheus(named) == named
    assert ps.find_prometheus() == other


@pytest.mark.parametrize(("find", "variable"), [(ps.find_prometheus, "PROMETHEUS"), (ps.find_promtool, "PROMTOOL")])
def test_a_named_binary_is_never_replaced(
    find: Callable[[], Path], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with pytest.raises(ps.PrometheusMissing, match=rf"absent.*apt-get install prometheus.*{variable}=/path"):
        find()


def test_missing_binary_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS", raising=False)
    monkeypatch.setattr("monitoring.prometheus_server.shutil.which", lambda _: None)
    with pytest.raises(ps.PrometheusMissing, match=r"in \$PROMETHEUS, on PATH or at /usr/bin/prometheus;"):
        ps.find_prometheus()


def test_command_listens_on_loopback() -> None:
    assert ps.command(Path("/bin/p"), Path("/c.yml"), Path("/data")) == [
        "/bin/p", "--config.file=/c.yml", "--storage.tsdb.path=/data", "--web.listen-address=127.0.0.1:9090"
    ]  # fmt: skip


def test_resolved_config_has_the_targets_and_the_rules(tmp_path: Path) -> None:
    path = ps.resolve_config(tmp_path / "new", "127.0.0.1:1", "127.0.0.1:3", scrape_seconds=1)
    config = load(path)
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"llmlab-gateway": ["127.0.0.1:1"], "llmlab-engine": ["127.0.0.1:1"], "llmlab-training": ["127.0.0.1:3"]}
    assert set(config["global"].values()) == {"1s"}
    assert load(path.parent / "rules.yml") == load(ps.CONFIG.parent / "rules.yml")


def test_resolved_config_keeps_the_defaults(tmp_path: Path) -> None:
    assert load(ps.resolve_config(tmp_path)) == load(ps.CONFIG)


# --- the child process ---------------------------------------------------------------------------


def test_an_address_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        program = executable(tmp_path / "prometheus")
        server = ps.PrometheusServer(ps.CONFIG, tmp_path / "data", listen, program)
        with pytest.raises(ps.PrometheusFailed, match="cannot listen on"):
            server.start()


def test_an_early_end_shows_the_log(tmp_path: Path) -> None:
    failing = executable(tmp_path / "prometheus", "echo no such option; exit 2")
    server = ps.PrometheusServer(ps.CONFIG, tmp_path / "data", free_address(), failing)
    with pytest.raises(ps.PrometheusFailed, match=r"ended with status 2:\nno such option"):
        server.start()


def test_one_that_never_gets_ready_is_stopped(tmp_path: Path) -> None:
    hanging = executable(tmp_path / "prometheus", "echo still loading; exec sleep 60")
    server = ps.PrometheusServer(ps.CONFIG, tmp_path / "data", free_address(), hanging, 0.3)
    with pytest.raises(ps.PrometheusFailed, match="not ready after 0.3 s"):
        server.start()
    with pytest.raises(ps.PrometheusFailed, match="was not started"):
        server.wait()


# --- the real programs ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(ps.CONFIG)],
        ["check", "rules", str(ps.CONFIG.parent / "rules.yml")],
        ["test", "rules", str(RULES_TEST)],
    ],
    ids=["check-config", "check-rules", "test-rules"],
)
def test_promtool_accepts(arguments: list[str]) -> None:
    done = subprocess.run([binary(ps.find_promtool), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def exporter() -> Iterator[str]:
    """Serve the registry as the gateway does; give its host:port."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=metrics.REGISTRY)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def query(url: str, expr: str) -> list[dict[str, Any]]:
    request = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
        result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return [series for series in result if series["value"][1] != "NaN"]


def learn_one_step() -> None:
    labels = {"model": "smollm2-135m", "recipe": "lora", "rehearsal": "no"}
    for gauge in (metrics.TRAINING_LOSS, metrics.TRAINING_GRADIENT_NORM, metrics.TRAINING_LEARNING_RATE, metrics.TRAINING_ETA,
                  metrics.TRAINING_TOKENS_PER_SECOND, metrics.TRAINING_STEPS_DONE, metrics.TRAINING_PEAK_MEMORY):  # fmt: skip
        gauge.labels(**labels).set(2)
    metrics.TRAINING_STEPS_PLANNED.labels(**labels).set(8)
    metrics.TRAINING_ROWS.labels(**labels).inc(8)


def serve_one_question() -> None:
    metrics.HTTP_REQUESTS.labels(route="/v1/rag/query", method="POST", status="200").inc()
    metrics.HTTP_REQUEST_DURATION.labels(route="/v1/rag/query").observe(1.3)
    metrics.GENERATION_REQUESTS.labels(model="other", outcome="ok").inc()
    metrics.GENERATION_TTFT.labels(model="other").observe(0.08)
    metrics.GENERATION_DURATION.labels(model="other").observe(1.2)
    metrics.PROMPT_TOKENS.labels(model="other").inc(300)
    metrics.GENERATED_TOKENS.labels(model="other").inc(100)
    metrics.RAG_REQUESTS.labels(outcome="answered").inc()
    for stage in metrics.RAG_STAGES:
        metrics.RAG_STAGE_DURATION.labels(stage=stage).observe(0.02)
    metrics.RAG_HITS.observe(4)
    metrics.RAG_TOP_SCORE.observe(0.7)
    metrics.RAG_CITATIONS.labels(valid="yes").inc()
    metrics.ADAPTER_CHANGES.labels(change="add", outcome="ok").inc()
    metrics.ADMISSION_WAIT.observe(0.1)
    for stage in metrics.GUARD_STAGES:
        metrics.GUARD_DURATION.labels(stage=stage).observe(0.002)


@pytest.mark.slow
def test_a_real_prometheus_answers_every_panel(exporter: str, tmp_path: Path) -> None:
    program = binary(ps.find_prometheus)
    metrics.set_engine("llamacpp", "no GPU is present")
    metrics.set_build("0.1.0")
    metrics.INDEX_CHUNKS.set(1234)
    metrics.INDEX_CREATED.set(time.time())
    with contextlib.ExitStack() as running:
        training = urllib.parse.urlsplit(running.enter_context(Exporter(metrics.TRAINING, 0)).url).netloc
        config = ps.resolve_config(tmp_path / "config", exporter, training, scrape_seconds=1)
        server = running.enter_context(ps.PrometheusServer(config, tmp_path / "data", free_address(), program))
        empty, deadline = [("all", "")], time.monotonic() + 30
        while empty and time.monotonic() < deadline:
            serve_one_question()
            learn_one_step()
            time.sleep(0.25)
            panels = dashboards.panel_expressions("10s")
            empty = [(title, expr) for title, expr in panels if not query(server.url, expr)]
        assert empty == []
        assert query(server.url, "max(llmlab_index_chunks)")[0]["value"][1] == "1234"
        assert query(server.url, 'up{job="llmlab-gateway"}')[0]["value"][1] == "1"
        assert query(server.url, "llmlab_training_steps_done / llmlab_training_steps_planned")[0]["value"][1] == "0.25"
    assert not ps._answers(f"{server.url}/-/ready")
