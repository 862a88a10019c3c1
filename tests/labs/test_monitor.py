"""`make monitor-stop`: it ends what was left running, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from labs import monitor


@pytest.fixture
def left() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_stop_ends_what_is_left_and_nobody_elses(
    left: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "STATE", tmp_path)
    monkeypatch.setattr(monitor, "docker_is_missing", lambda: "Docker is not installed")
    ours, others = left
    began = psutil.Process(ours.pid).create_time()
    kept = {"Prometheus": [ours.pid, began], "Grafana": [others.pid, began - 100], "Alertmanager": [2**22 + 1, began]}
    (tmp_path / monitor.CHILDREN).write_text(json.dumps(kept))
    said: list[str] = []
    monitor.stop(said.append)
    assert said == ["stopped Prometheus"]
    assert not psutil.pid_exists(ours.pid) and others.poll() is None
    monitor.stop(said.append)
    assert said[-1] == "nothing of make monitor was running"
