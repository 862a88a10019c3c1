"""Prometheus: its configuration, the Compose file, and the child process. Its answers are in tests/serving/test_watching.py."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import prometheus_server as ps
from monitoring.child_server import ProgramFailed, ProgramMissing

MONITORING = ps.CONFIG.parent.parent
COMPOSE = MONITORING / "compose.yaml"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# --- files ---------------------------------------------------------------------------------------


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
    assert set(services) == {"prometheus", "alertmanager", "grafana"}
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    assert f"--web.listen-address={ps.LISTEN}" in services["prometheus"]["command"]
    assert f"--web.listen-address={ps.ALERTMANAGER}" in services["alertmanager"]["command"]
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
    with pytest.raises(ProgramMissing, match=rf"absent.*apt-get install prometheus.*{variable}=/path"):
        find()


def test_missing_binary_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS", raising=False)
    monkeypatch.setattr("monitoring.child_server.shutil.which", lambda _: None)
    with pytest.raises(ProgramMissing, match=r"in \$PROMETHEUS, on PATH or at /usr/bin/prometheus;"):
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
    assert load(path.parent / "alerts.yml") == load(ps.CONFIG.parent / "alerts.yml")
    assert all("interval" not in group for group in load(path.parent / "objectives.yml")["groups"])
    assert load(path)["alerting"]["alertmanagers"][0]["static_configs"] == [{"targets": [ps.ALERTMANAGER]}]
    assert "alerting" not in load(ps.resolve_config(tmp_path / "alone", alertmanager=None))


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
        with pytest.raises(ProgramFailed, match="cannot listen on"):
            server.start()


def test_an_early_end_shows_the_log(tmp_path: Path) -> None:
    failing = executable(tmp_path / "prometheus", "echo no such option; exit 2")
    server = ps.PrometheusServer(ps.CONFIG, tmp_path / "data", free_address(), failing)
    with pytest.raises(ProgramFailed, match=r"ended with status 2:\nno such option"):
        server.start()


def test_one_that_never_gets_ready_is_stopped(tmp_path: Path) -> None:
    hanging = executable(tmp_path / "prometheus", "echo still loading; exec sleep 60")
    server = ps.PrometheusServer(ps.CONFIG, tmp_path / "data", free_address(), hanging, 0.3)
    with pytest.raises(ProgramFailed, match="not ready after 0.3 s"):
        server.start()
    with pytest.raises(ProgramFailed, match="was not started"):
        server.wait()
