"""Training killed with SIGKILL at chosen points, then resumed: the same losses and the same adapter, to the bit; and an index.

`make test-faults` takes 120 points of a training and over 200 of an index; `make test-all` a sample. Points are spread over
all events, so they fall into steps, checkpoints and the sealing of a run (driver.py), or into the build, sync and switch of an
index (index_driver.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ROOT

POINTS = 120
SAMPLE = 8


def drive(root: Path, mode: str, *events: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), str(root), mode, *map(str, events)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return lines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    talks = [(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(60)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in talks]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, Any]:
    return drive(root, "count")[0]


def check(root: Path, whole: dict[str, Any], points: int) -> dict[str, int]:
    first = 3
    events = sorted({first + round(i * (whole["events"] - first) / (points - 1)) for i in range(points)})
    ends = drive(root, "kill", *events)
    assert [end["event"] for end in ends] == events
    for end in ends:
        assert "not_killed" not in end and "not_resumed" not in end, end
        for key in ("losses", "norms", "adapter"):
            assert end[key] == whole[key], (end["event"], key)
    return {"points": len(ends), "after a checkpoint": sum(end["checkpoints"] > 0 for end in ends),
            "after the run was sealed": sum(end["accepted"] for end in ends)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sample_of_kill_points(root: Path, whole: dict[str, Any]) -> None:
    assert check(root, whole, SAMPLE)["after a checkpoint"] >= 2


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_every_kill_point(root: Path, whole: dict[str, Any], report_figure: Any) -> None:
    counts = check(root, whole, POINTS)
    report_figure(f"killed and resumed to the bit, of {whole['events']} events: {counts}")
    assert counts["points"] >= 100 and counts["after a checkpoint"] >= 30


SMALL = """
import sys
from tests.conftest import MODEL, Quiet
from pipelines.errors import LabError
from pipelines.tune.finetune import Job, finetune
overrides = (f"data={sys.argv[1]}", "schedule.steps=4", "schedule.checkpoint_every_steps=1")
try:
    finetune(Job(MODEL, "lora-quick", overrides, rehearse=True, pull=False), Quiet())
    print("finished")
except LabError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=700k", "DiskFull no space left"),
        pytest.param("ro", "NotWritable", marks=pytest.mark.slow),
        pytest.param("size=64m", "finished", marks=pytest.mark.slow),
    ],
)
def test_a_full_and_a_read_only_disk_are_explained(root: Path, tmp_path: Path, options: str, message: str) -> None:
    """A real file system of that size, in a mount namespace of its own."""
    inner = f'mount -t tmpfs -o {options} none {tmp_path} && exec {sys.executable} -c "$0" {root / "rows.jsonl"}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LLMLAB_RUNS": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inner, SMALL], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert message in done.stdout, done.stderr[-2000:]


def kill_index(root: Path, points: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("index_driver.py")), str(root), str(points)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_sample_of_kill_points_of_an_index(tmp_path: Path) -> None:
    assert set(kill_index(tmp_path, 24)["found"]) == {"build: old", "build: new", "sync: old", "sync: new"}


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_every_kill_point_of_an_index(tmp_path: Path, report_figure: Any) -> None:
    counts = kill_index(tmp_path, 300)
    report_figure(f"index killed, opened and synced: {counts}")
    assert counts["points"] >= 200
