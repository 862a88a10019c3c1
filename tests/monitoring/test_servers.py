"""Alertmanager for real, where it is installed; Grafana, which is not to be had here, by what it would be started with."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import alertmanager_server, grafana_server
from monitoring import prometheus_server as ps
from monitoring.child_server import ProgramMissing
from tests.monitoring.test_prometheus import executable, free_address

# It writes down how it was started, and answers as Grafana does when it is ready.
STANDS_FOR_GRAFANA = f"""exec {sys.executable} - "$@" <<'END'
import http.server, json, os, pathlib, sys
given = {{"arguments": sys.argv[1:], "environment": {{k: v for k, v in os.environ.items() if k.startswith("GF_")}}}}
pathlib.Path(os.environ["GF_PATHS_DATA"], "started.json").write_text(json.dumps(given))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer((os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])), Answer).serve_forever()
END"""


def test_grafana_is_started_with_everything_from_files(tmp_path: Path) -> None:
    (tmp_path / "home" / "bin").mkdir(parents=True)
    executable(tmp_path / "home" / "bin" / "grafana", STANDS_FOR_GRAFANA)
    home = grafana_server.find_home(tmp_path / "home")
    assert home
    (tmp_path / "data").mkdir()
    with grafana_server.grafana(home, tmp_path / "data", "http://127.0.0.1:9", "pass word", free_address()) as server:
        started = json.loads((tmp_path / "data" / "started.json").read_text())
    assert started["arguments"] == ["server", f"--homepath={home}"] and server.pid is None
    given = started["environment"]
    assert given["GF_SERVER_HTTP_ADDR"] == "127.0.0.1" and given["GF_SECURITY_ADMIN_PASSWORD"] == "pass word"
    compose = yaml.safe_load((ps.CONFIG.parents[1] / "compose.yaml").read_text())["services"]["grafana"]["environment"]
    assert grafana_server.OFFLINE.items() <= compose.items() and grafana_server.OFFLINE.items() <= given.items()
    files = {path.relative_to(tmp_path / "data" / "provisioning"): yaml.safe_load(path.read_text())
             for path in Path(given["GF_PATHS_PROVISIONING"]).rglob("*.yaml")}  # fmt: skip
    assert files[Path("datasources/prometheus.yaml")]["datasources"][0]["url"] == "http://127.0.0.1:9"
    boards = Path(files[Path("dashboards/llmlab.yaml")]["providers"][0]["options"]["path"])
    assert len(list(boards.glob("*.json"))) == 5
    assert "pass word" not in "".join(path.read_text() for path in (tmp_path / "data" / "provisioning").rglob("*.yaml"))


def test_a_named_grafana_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFANA", str(tmp_path))
    with pytest.raises(ProgramMissing, match="no bin/grafana"):
        grafana_server.find_home()
    monkeypatch.delenv("GRAFANA")
    assert grafana_server.find_home() is None


def test_alertmanager_is_found_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ALERTMANAGER", raising=False)
    debians = executable(tmp_path / "prometheus-alertmanager")
    assert alertmanager_server.find_alertmanager() == debians
    monkeypatch.setenv("ALERTMANAGER", str(tmp_path / "absent"))
    with pytest.raises(ProgramMissing, match="ALERTMANAGER=/path"):
        alertmanager_server.find_alertmanager()


def get(url: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
        return json.load(answer)["data"]


@pytest.mark.slow
def test_prometheus_and_a_real_alertmanager_find_each_other(tmp_path: Path) -> None:
    at = free_address()
    try:
        alerts = alertmanager_server.alertmanager(tmp_path / "alertmanager", at)
        config = ps.resolve_config(tmp_path / "config", scrape_seconds=1, alertmanager=at)
        with alerts, ps.PrometheusServer(config, tmp_path / "data", free_address()) as server:
            deadline = time.monotonic() + 20  # it looks for them every five seconds
            while not (active := get(f"{server.url}/api/v1/alertmanagers")["activeAlertmanagers"]):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            names = {rule["name"] for group in get(f"{server.url}/api/v1/rules?type=alert")["groups"] for rule in group["rules"]}
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    assert [one["url"] for one in active] == [f"http://{at}/api/v2/alerts"]
    assert "LlmlabTtftBurn" in names
