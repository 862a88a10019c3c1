"""Watch the running server and training: Prometheus here, Grafana through Compose where there is Docker. `make monitor`"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from monitoring import prometheus_server
from pipelines.config import ROOT
from pipelines.errors import EngineError
from serving.launch import stopped_by_signals

COMPOSE = ROOT / "monitoring" / "compose.yaml"
STATE = ROOT / ".cache" / "prometheus"
GRAFANA_URL = "http://127.0.0.1:3000"

Say = Callable[[str], None]


def monitor(gateway: str, training: str, say: Say) -> None:
    """Run Prometheus, and Grafana if there is Docker, until Ctrl-C; both listen on loopback.

    Args:
        gateway: host:port of the gateway, which passes on the engine's own metrics.
        training: host:port at which a training answers while it runs.
        say: receives lines for the user.

    Raises:
        EngineError: there is no Prometheus, or it does not start.
    """
    try:
        with stopped_by_signals(), prometheus(gateway, training) as server:
            say(f"Prometheus {server.url} scrapes gateway {gateway} with its engine, and training {training}")
            with grafana(say):
                say("Ctrl-C stops")
                while True:
                    time.sleep(3600)
    except KeyboardInterrupt:
        say("stopped")


@contextmanager
def prometheus(
    gateway: str, training: str, listen: str = prometheus_server.LISTEN
) -> Iterator[prometheus_server.PrometheusServer]:
    """Run Prometheus for the length of the block; `EngineError` if it is missing or does not start."""
    try:
        config = prometheus_server.resolve_config(STATE, gateway, training)
        with prometheus_server.PrometheusServer(config, STATE / "data", listen) as server:
            yield server
    except (prometheus_server.PrometheusMissing, prometheus_server.PrometheusFailed) as error:
        raise EngineError(str(error), "a Prometheus server", "make doctor") from None


@contextmanager
def grafana(say: Say) -> Iterator[None]:
    """Run Grafana for the length of the block where Docker works; say why not where it does not."""
    why_not = docker_is_missing()
    if why_not:
        say(f"no Grafana: {why_not}. The dashboard is monitoring/grafana/dashboards/overview.json, for any Grafana of yours")
        yield
        return
    password = os.environ.get("GRAFANA_ADMIN_PASSWORD") or secrets.token_urlsafe(12)
    environment = os.environ | {"GRAFANA_ADMIN_PASSWORD": password}
    compose = ["docker", "compose", "-f", str(COMPOSE)]
    if subprocess.run([*compose, "up", "-d", "--no-deps", "grafana"], env=environment, check=False).returncode:
        say("no Grafana: Compose could not start it, see above")
        yield
        return
    given = "from GRAFANA_ADMIN_PASSWORD" if os.environ.get("GRAFANA_ADMIN_PASSWORD") else f"{password} (made for this start)"
    say(f"Grafana {GRAFANA_URL}, user admin, password {given}")
    try:
        yield
    finally:
        subprocess.run([*compose, "down", "--volumes"], env=environment, check=False)


def docker_is_missing() -> str:
    """Return why Compose cannot be used here, or an empty text."""
    if not shutil.which("docker"):
        return "Docker is not installed"
    for command, problem in (
        (["docker", "compose", "version"], "Docker has no Compose"),
        (["docker", "info"], "the Docker daemon does not answer"),
    ):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return problem
    return ""
