"""Run a Prometheus that is installed on this machine, as a child process, without containers.

It finds the binary, writes a configuration for the ports in use, waits until Prometheus is ready and stops it
at the end. It does not install Prometheus, does not run Grafana (see `compose.yaml`) and does not define what
is scraped by default (see `prometheus/prometheus.yml`). The command is:

    make monitor
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

import yaml

CONFIG = Path(__file__).parent / "prometheus" / "prometheus.yml"
LISTEN = "127.0.0.1:9090"
GATEWAY_JOB, ENGINE_JOB, TRAINING_JOB = "llmlab-gateway", "llmlab-engine", "llmlab-training"
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PrometheusMissing(RuntimeError):
    """No Prometheus binary was found; the message says where it was looked for and how to get one."""


class PrometheusFailed(RuntimeError):
    """Prometheus ended, or was not ready in time; the message holds the end of its log."""


def find_prometheus(given: str | Path | None = None) -> Path:
    """Return the Prometheus binary: `given`, else $PROMETHEUS, else on PATH, else /usr/bin/prometheus.

    Raises:
        PrometheusMissing: there is none, or the one that was named does not exist.
    """
    return _find("prometheus", given or os.environ.get("PROMETHEUS"))


def find_promtool(given: str | Path | None = None) -> Path:
    """Return promtool: `given`, else $PROMTOOL, else on PATH, else /usr/bin/promtool.

    Raises:
        PrometheusMissing: there is none, or the one that was named does not exist.
    """
    return _find("promtool", given or os.environ.get("PROMTOOL"))


def command(binary: Path, config: Path, storage: Path, listen: str = LISTEN) -> list[str]:
    """Return the command line that runs Prometheus with this configuration, data directory and host:port."""
    return [
        str(binary),
        f"--config.file={config}",
        f"--storage.tsdb.path={storage}",
        f"--web.listen-address={listen}",
    ]


def resolve_config(
    directory: Path,
    gateway: str = "127.0.0.1:8000",
    training: str = "127.0.0.1:8090",
    scrape_seconds: int | None = None,
) -> Path:
    """Write the configuration, with these scrape targets, and its rules to `directory`; return its path.

    Args:
        directory: created if need be.
        gateway: host:port of the gateway, which has the engine's metrics too.
        training: host:port at which a training answers while it runs.
        scrape_seconds: seconds between two scrapes and rule evaluations; None keeps those of the file.
    """
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    targets = {GATEWAY_JOB: gateway, ENGINE_JOB: gateway, TRAINING_JOB: training}
    config["scrape_configs"] = [
        {**job, "static_configs": [{"targets": [targets[job["job_name"]]]}]} for job in config["scrape_configs"]
    ]
    if scrape_seconds is not None:
        names = ("scrape_interval", "scrape_timeout", "evaluation_interval")
        config["global"].update(dict.fromkeys(names, f"{scrape_seconds}s"))
    directory.mkdir(parents=True, exist_ok=True)
    for name in config["rule_files"]:
        shutil.copyfile(CONFIG.parent / name, directory / name)
    path = directory / CONFIG.name
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


class PrometheusServer:
    """A Prometheus child process; use it as a context manager.

        with PrometheusServer(resolve_config(directory), directory / "data") as server:
            server.wait()

    Args:
        config: the configuration file.
        storage: directory of its data, kept between runs; its log is `prometheus.log` in there.
        listen: host:port of its own page and API.
        binary: the binary; None looks for one, see `find_prometheus`.
        ready_timeout_seconds: how long it may take to get ready.

    Raises:
        PrometheusMissing: on construction, when there is no binary.
        PrometheusFailed: on entry, when it cannot start.
    """

    def __init__(
        self,
        config: Path,
        storage: Path,
        listen: str = LISTEN,
        binary: str | Path | None = None,
        ready_timeout_seconds: float = 30.0,
    ) -> None:
        """Find the binary; nothing is started yet."""
        self.command = command(find_prometheus(binary), config, storage, listen)
        self.url = f"http://{listen}"
        self.log = storage / "prometheus.log"
        self._listen = listen
        self._ready_timeout_seconds = ready_timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrometheusServer:
        """Start Prometheus and return when it is ready."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop Prometheus, whatever happened."""
        self.stop()

    def start(self) -> None:
        """Start Prometheus and wait until it is ready."""
        _require_free(self._listen)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Block until Prometheus ends by itself; return its exit status."""
        if self._process is None:
            raise PrometheusFailed("Prometheus was not started")
        return self._process.wait()

    def stop(self) -> None:
        """Ask Prometheus to end, and insist after 10 seconds; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._ready_timeout_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                status = process.returncode
                raise PrometheusFailed(f"Prometheus ended with status {status}:\n{self._log_end()}")
            if _answers(f"{self.url}/-/ready"):
                return
            time.sleep(0.05)
        seconds = self._ready_timeout_seconds
        raise PrometheusFailed(f"Prometheus was not ready after {seconds:g} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])


def _find(name: str, given: str | Path | None) -> Path:
    fix = f"install it (apt-get install prometheus) or set {name.upper()}=/path/to/{name}"
    if given:
        named = shutil.which(given)
        if named is None:
            raise PrometheusMissing(f"{given} was named as the {name} binary, but is no executable; {fix}")
        return Path(named)
    found = shutil.which(name) or shutil.which(f"/usr/bin/{name}")
    if found is None:
        raise PrometheusMissing(f"no {name} binary in ${name.upper()}, on PATH or at /usr/bin/{name}; {fix}")
    return Path(found)


def _require_free(listen: str) -> None:
    """Refuse an address in use, where another server's /-/ready would be taken for ours."""
    host, _, port = listen.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise PrometheusFailed(f"Prometheus cannot listen on {listen}: {error.strerror}") from error


def _answers(url: str) -> bool:
    try:
        with _LOOPBACK.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
