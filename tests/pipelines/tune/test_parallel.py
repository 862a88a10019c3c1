"""One training in two processes, through the command line: the same losses and the same adapter as in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import hardware
from pipelines.config import ROOT
from pipelines.errors import ConfigError
from pipelines.tune.finetune import Job, finetune
from pipelines.tune.parallel import _free_port
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


def start(place: Path, runs: str, processes: int, steps: int = 4, more: Sequence[str] = ()) -> subprocess.Popen[str]:
    sets = [argument for s in (*SETTINGS, f"schedule.steps={steps}", *more) for argument in ("--set", s)]
    command = [sys.executable, "-m", "labs", "finetune", MODEL, "--recipe", "lora", "--data", str(place / "rows.jsonl"),
               "--pull", "never", "--processes", str(processes), *sets]  # fmt: skip
    environment = os.environ | {"LLMLAB_MODELS": str(place / "models"), "LLMLAB_RUNS": str(place / runs)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("finetune/*/[0-9.]*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


SHARDED_SETTINGS = ("schedule.shard_weights=true", "schedule.checkpointing=true", "schedule.rows_per_step=5")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), SHARDED_SETTINGS])
def test_two_processes_learn_what_one_learns(more: Sequence[str], place: Path) -> None:
    found, cards = {}, {}
    for processes in (1, 2):
        output, _ = (process := start(place, f"runs-{processes}", processes, more=more)).communicate(timeout=200)
        assert process.returncode == 0, output
        found[processes] = rows_of(place / f"runs-{processes}")
        (card,) = (place / f"runs-{processes}").glob("finetune/*/[0-9.]*/proof.json")
        cards[processes] = json.loads(card.read_text())
    for key in ("loss", "gradient_norm"):
        assert [r[key] for r in found[2]] == pytest.approx([r[key] for r in found[1]], rel=1e-5)
    assert all(r["rows"] == (5 if more else 6) for r in found[2])
    assert cards[2] == cards[1]


SHARDED = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from pipelines.tune.parallel import _join
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe
together = _join()
model = tiny_model(Path(sys.argv[1]), tiny_recipe())
layers = [p for layer in model.get_base_model().get_decoder().layers for p in layer.parameters() if not p.requires_grad]
whole = sum(p.numel() for p in layers)
with torch.no_grad():
    before = model(torch.arange(10)[None]).logits
together.shard(model)
held = [p for layer in model.get_base_model().get_decoder().layers for p in layer.parameters() if not p.requires_grad]
with torch.no_grad():
    apart = float((model(torch.arange(10)[None]).logits - before).abs().max())
trained = all(not isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
print(json.dumps({"whole": whole, "held": sum(p.to_local().numel() for p in held), "apart": apart, "trained": trained}))
"""


@pytest.mark.slow
def test_each_process_holds_a_share_of_the_frozen_layers(tiny: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    environment = os.environ | place | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(tiny)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                         env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    assert sum(f["held"] for f in found) == found[0]["whole"] > 0
    assert all(0.4 < f["held"] / f["whole"] < 0.6 and f["trained"] and f["apart"] < 1e-5 for f in found)


@pytest.mark.slow
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


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "choose_device", lambda: hardware.Choice("cuda", "as if"))
    monkeypatch.setattr(hardware, "cuda_devices", lambda: 2)
    with pytest.raises(ConfigError, match=r"(?s)4 processes were asked for.*one for each GPU that torch can use, 2"):
        finetune(Job(MODEL, "lora-fsdp", processes=4), Quiet())
