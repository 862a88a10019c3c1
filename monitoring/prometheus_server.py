"""A Prometheus that is installed on this machine: its configuration for the ports in use, and its command line.

It does not install Prometheus and does not define what is scraped by default (see `prometheus/prometheus.yml`). The command is:

    make monitor
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from monitoring.child_server import ChildServer, find

CONFIG = Path(__file__).parent / "prometheus" / "prometheus.yml"
LISTEN = "127.0.0.1:9090"
ALERTMANAGER = "127.0.0.1:9093"
GATEWAY_JOB, ENGINE_JOB, TRAINING_JOB = "llmlab-gateway", "llmlab-engine", "llmlab-training"


def find_prometheus(given: str | Path | None = None) -> Path:
    """Return the Prometheus binary: `given`, else $PROMETHEUS, else on PATH; `ProgramMissing` if there is none."""
    return find(["prometheus"], "PROMETHEUS", "prometheus", given)


def find_promtool(given: str | Path | None = None) -> Path:
    """Return promtool: `given`, else $PROMTOOL, else on PATH; `ProgramMissing` if there is none."""
    return find(["promtool"], "PROMTOOL", "prometheus", given)


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
    alertmanager: str | None = ALERTMANAGER,
) -> Path:
    """Write the configuration, with these scrape targets, and its rules to `directory`; return its path.

    Args:
        directory: created if need be.
        gateway: host:port of the gateway, which has the engine's metrics too.
        training: host:port at which a training answers while it runs.
        scrape_seconds: seconds between two scrapes and rule evaluations; None keeps those of the file.
        alertmanager: host:port of who is told about alerts; None if nobody is.
    """
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    targets = {GATEWAY_JOB: gateway, ENGINE_JOB: gateway, TRAINING_JOB: training}
    config["scrape_configs"] = [
        {**job, "static_configs": [{"targets": [targets[job["job_name"]]]}]} for job in config["scrape_configs"]
    ]
    config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [alertmanager]}]
    if alertmanager is None:
        del config["alerting"]
    if scrape_seconds is not None:
        names = ("scrape_interval", "scrape_timeout", "evaluation_interval")
        config["global"].update(dict.fromkeys(names, f"{scrape_seconds}s"))
    directory.mkdir(parents=True, exist_ok=True)
    for name in config["rule_files"]:
        _copy_rules(CONFIG.parent / name, directory / name, scrape_seconds)
    path = directory / CONFIG.name
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


class PrometheusServer(ChildServer):
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
        ProgramMissing: on construction, when there is no binary.
        ProgramFailed: on entry, when it cannot start.
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
        words = command(find_prometheus(binary), config, storage, listen)
        log = storage / "prometheus.log"
        super().__init__("Prometheus", words, listen, "/-/ready", log, ready_timeout_seconds=ready_timeout_seconds)


def _copy_rules(rules: Path, to: Path, seconds: int | None) -> None:
    """Copy a file of rules; with `seconds`, groups that have an interval of their own get this one."""
    if seconds is None:
        shutil.copyfile(rules, to)
        return
    content = yaml.safe_load(rules.read_text(encoding="utf-8"))
    for group in content["groups"]:
        group.pop("interval", None)  # then it is evaluation_interval
    to.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
