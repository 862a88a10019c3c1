"""One training in two processes, through the command line: the same losses and the same adapter as in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.config import ROOT
from pipelines.errors import ConfigError
from pipelines.tune.finetune import Job, finetune
from tests.conftest import MODEL, Quiet

SETTINGS = (
    "schedule.rows_per_step=6",
    "schedule.rows_per_prompt=1",
    "schedule.checkpoint_every_steps=1",
    "schedule.max_tokens=4096",
)


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the shrunk model where the lab looks for weights that a user placed, and a file of rows."""
    shutil.copytree(tiny, tmp_path / "models" / MODEL)
    talks = [(f"What is {n} plus {n}? " + "Think well. " * (n % 7), f"It is {2 * n}.") for n in range(24)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in talks]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def start(place: Path, runs: str, processes: int, steps: int = 4) -> subprocess.Popen[str]:
    sets = [argument for s in (*SETTINGS, f"schedule.steps={steps}") for argument in ("--set", s)]
    command = [sys.executable, "-m", "labs", "finetune", MODEL, "--recipe", "lora", "--data", str(place / "rows.jsonl"),
               "--pull", "never", "--processes", str(processes), *sets]  # fmt: skip
    environment = os.environ | {"LLMLAB_MODELS": str(place / "models"), "LLMLAB_RUNS": str(place / runs)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("finetune/*/[0-9.]*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_learn_what_one_learns(place: Path) -> None:
    found = {}
    for processes in (1, 2):
        output, _ = (process := start(place, f"runs-{processes}", processes)).communicate(timeout=200)
        assert process.returncode == 0, output
        found[processes] = rows_of(place / f"runs-{processes}")
    for key in ("loss", "gradient_norm"):
        assert [r[key] for r in found[2]] == pytest.approx([r[key] for r in found[1]], rel=1e-5)
    assert all(r["rows"] == 6 for r in found[2])


def test_a_helper_that_dies_is_told_and_the_work_goes_on_from_the_checkpoint(place: Path) -> None:
    process = start(place, "runs", 2, steps=400)
    deadline = time.monotonic() + 120
    while not list((place / "runs").glob("finetune/*/.working-*/checkpoint/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (helper,) = [p for p in psutil.Process(process.pid).children() if "pipelines.tune.parallel" in p.cmdline()]
    helper.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "a process of the training is gone" in output and "Traceback" not in output
    again = start(place, "runs", 2, steps=400)
    assert again.stdout
    seen = ""
    while "resuming after step" not in seen:
        line = again.stdout.readline()
        assert line, seen
        seen += line
    again.send_signal(signal.SIGINT)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 130 and "Traceback" not in output
    assert not [p for p in psutil.process_iter(["cmdline"]) if "pipelines.tune.parallel" in (p.info["cmdline"] or [])]


def test_a_rehearsal_is_one_process() -> None:
    with pytest.raises(ConfigError, match="2 processes were asked for, for a rehearsal"):
        finetune(Job(MODEL, rehearse=True, processes=2), Quiet())
