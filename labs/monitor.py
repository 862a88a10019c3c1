"""Watch the running server and training: Prometheus, and Alertmanager and Grafana where there are any. `make monitor`

What is installed here runs as a child process and ends with this one. Where there is no Prometheus but Docker, Compose runs
all three; where there is no Grafana but Docker, Compose runs that. `make monitor-stop` ends what a killed one left running.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from monitoring import alertmanager_server, grafana_server, prometheus_server
from monitoring.child_server import ChildServer, ProgramFailed, ProgramMissing
from pipelines.config import ROOT
from pipelines.errors import EngineError
from serving.launch import stopped_by_signals

COMPOSE = ROOT / "monitoring" / "compose.yaml"
STATE = ROOT / ".cache" / "prometheus"
CHILDREN = "children.json"  # in STATE: which processes run, for `stop`
PASSWORD = "GRAFANA_ADMIN_PASSWORD"
GRAFANA_URL = f"http://{grafana_server.LISTEN}"
RENDER = "llmlab dashboards render overview -o overview.html draws one without Grafana"

Say = Callable[[str], None]


def monitor(gateway: str, training: str, say: Say) -> None:
    """Run Prometheus, and Alertmanager and Grafana if they are there, until Ctrl-C; all listen on loopback.

    Args:
        gateway: host:port of the gateway, which passes on the engine's own metrics.
        training: host:port at which a training answers while it runs.
        say: receives lines for the user.

    Raises:
        EngineError: there is no Prometheus and no Docker, or one of them does not start.
    """
    try:
        with stopped_by_signals(), ExitStack() as stack:
            if _prometheus_is_missing() and not docker_is_missing():
                stack.enter_context(_composed(["prometheus", "alertmanager", "grafana"], say))
                say(f"Prometheus http://{prometheus_server.LISTEN} in a container, with the default ports of prometheus.yml")
            else:
                server = stack.enter_context(prometheus(gateway, training, say=say))
                say(f"Prometheus {server.url} scrapes gateway {gateway} with its engine, and training {training}")
                stack.enter_context(grafana(server.url, say))
            say("Ctrl-C stops")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        say("stopped")


@contextmanager
def prometheus(
    gateway: str, training: str, listen: str = prometheus_server.LISTEN, say: Say = lambda _: None
) -> Iterator[ChildServer]:
    """Run Prometheus, and Alertmanager if there is one, for the length of the block; `EngineError` if one does not start."""
    try:
        with ExitStack() as stack:
            alerts = _alertmanager(say)
            if alerts:
                stack.enter_context(_running(alerts))
                say(f"Alertmanager {alerts.url} shows what fires")
            told = prometheus_server.ALERTMANAGER if alerts else None
            config = prometheus_server.resolve_config(STATE, gateway, training, alertmanager=told)
            yield stack.enter_context(_running(prometheus_server.PrometheusServer(config, STATE / "data", listen)))
    except (ProgramMissing, ProgramFailed) as error:
        raise EngineError(str(error), "a Prometheus server", "make doctor") from None


@contextmanager
def grafana(prometheus_url: str, say: Say) -> Iterator[None]:
    """Run Grafana for the length of the block: the one that GRAFANA names, else Compose's; say why not where there is neither."""
    home = grafana_server.find_home()
    why_not = docker_is_missing() if home is None else ""
    if why_not:
        say(f"no Grafana: GRAFANA names none, and {why_not}. Its boards are monitoring/grafana/dashboards/*.json; {RENDER}")
        yield
    elif home is None:
        with _composed(["grafana"], say):
            yield
    else:
        password, given = _password()
        with _running(grafana_server.grafana(home, STATE / "grafana", prometheus_url, password)) as server:
            say(f"Grafana {server.url}, user admin, password {given}")
            yield


def stop(say: Say) -> None:
    """End what an earlier `monitor` left running: its child processes, and Compose's containers."""
    stopped = _stop_children()
    if not docker_is_missing():
        subprocess.run(["docker", "compose", "-f", str(COMPOSE), "down"], env=os.environ | {PASSWORD: "none"}, check=False)
    say("stopped " + ", ".join(stopped) if stopped else "nothing of make monitor was running")


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


def _prometheus_is_missing() -> bool:
    """Return whether there is no Prometheus; one that was named and does not exist is an error, not a reason for Docker."""
    if os.environ.get("PROMETHEUS"):
        return False
    try:
        prometheus_server.find_prometheus()
    except ProgramMissing:
        return True
    return False


def _alertmanager(say: Say) -> ChildServer | None:
    try:
        return alertmanager_server.alertmanager(STATE / "alertmanager")
    except ProgramMissing as problem:
        if os.environ.get("ALERTMANAGER"):
            raise
        say(f"no Alertmanager: {problem}. Prometheus' page /alerts shows what fires")
        return None


@contextmanager
def _running(server: ChildServer) -> Iterator[ChildServer]:
    """Run a server for the length of the block, and keep its process id where `stop` finds it."""
    with server:
        assert server.pid
        kept = {**_children(), server.name: [server.pid, _began(server.pid)]}
        _keep(kept)
        try:
            yield server
        finally:
            _keep({name: one for name, one in _children().items() if name != server.name})


@contextmanager
def _composed(services: Sequence[str], say: Say) -> Iterator[None]:
    """Run services of the Compose file for the length of the block."""
    password, given = _password()
    environment = os.environ | {PASSWORD: password}
    compose = ["docker", "compose", "-f", str(COMPOSE)]
    if subprocess.run([*compose, "up", "-d", "--no-deps", *services], env=environment, check=False).returncode:
        say(f"no {', '.join(services)}: Compose could not start it, see above")
        yield
        return
    say(f"Grafana {GRAFANA_URL}, user admin, password {given}")
    try:
        yield
    finally:
        subprocess.run([*compose, "down", "--volumes"], env=environment, check=False)


def _password() -> tuple[str, str]:
    """Return the password of Grafana's admin, and what the user is told of it."""
    given = os.environ.get(PASSWORD)
    made = given or secrets.token_urlsafe(12)
    return made, f"from {PASSWORD}" if given else f"{made} (made for this start)"


def _stop_children() -> list[str]:
    import psutil

    stopped = []
    for name, (pid, began) in _children().items():
        try:
            process = psutil.Process(pid)
            if process.create_time() != began:
                continue  # another process has that number by now
            process.terminate()
            process.wait(10)
            stopped.append(name)
        except psutil.NoSuchProcess:
            continue
        except psutil.TimeoutExpired:
            process.kill()
            stopped.append(name)
    _keep({})
    return stopped


def _began(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def _children() -> dict[str, list[float]]:
    path = STATE / CHILDREN
    found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: [int(pid), began] for name, (pid, began) in found.items()}


def _keep(children: dict[str, list[float]]) -> None:
    path: Path = STATE / CHILDREN
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(children), encoding="utf-8")
