"""Runs one small training job, and can kill it: python driver.py ROOT MODE [EVENT ...]

The heavy imports are done once; each attempt is a fork. An event is a file operation below ROOT, a flush to disk, a layer
of a forward pass, or one side of an optimiser step. `count` prints how many events an undisturbed job has and what came of
it; `kill` takes event numbers and, for each, kills the job there with SIGKILL, checks that no run is taken for finished
that is not, resumes, and prints what came of it as one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - imported before the fork, as all that follows
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401

from pipelines import runs
from pipelines.tune import finetune
from tests.conftest import MODEL, Quiet

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def count_events(root: Path, on_event: Callable[[], None]) -> None:
    """Call `on_event` at each event from now on."""

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and str(arguments[0]).startswith(str(root)):
            on_event()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            on_event()
            return function(*arguments, **settings)

        return call

    sys.addaudithook(audit)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: on_event() if type(module).__name__.endswith("DecoderLayer") and module.training else None
    )
    torch.optim.AdamW.step = counted(torch.optim.AdamW.step)
    torch.optim.AdamW.zero_grad = counted(torch.optim.AdamW.zero_grad)


def job(root: Path) -> runs.Run:
    """The job: six steps on a shrunk model, a checkpoint after every second."""
    torch.set_num_threads(1)
    overrides = (
        f"data={root.parent / 'rows.jsonl'}",
        "schedule.steps=6",
        "schedule.checkpoint_every_steps=2",
        "held_out_share=0.1",
    )
    return finetune.finetune(finetune.Job(MODEL, "lora-quick", overrides, rehearse=True, pull=False), Quiet())


def outcome(run: runs.Run) -> dict[str, Any]:
    """What must be the same to the bit."""
    rows = [json.loads(line) for line in (run.path / finetune.METRICS).read_text().splitlines()]
    adapter = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"losses": [row["loss"] for row in rows], "norms": [row["gradient_norm"] for row in rows],
            "adapter": hashlib.sha256(adapter).hexdigest()}  # fmt: skip


def in_child(root: Path, work: Callable[[], None]) -> int:
    """Run `work` in a fork with its own folder of runs; return how it ended, as `os.waitpid` says."""
    pid = os.fork()
    if pid == 0:
        os.environ["LLMLAB_RUNS"] = str(root)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def undisturbed(root: Path) -> None:
    events = [0]

    def note() -> None:
        events[0] += 1

    count_events(root, note)
    run = job(root)
    print(json.dumps({"events": events[0]} | outcome(run)))


def killed_at(root: Path, event: int) -> None:
    seen = [0]

    def note() -> None:
        seen[0] += 1
        if seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    count_events(root, note)
    job(root)


def resumed(root: Path, event: int) -> None:
    accepted = [runs.read(path).id for path in runs.all_runs()]  # raises if a run that is listed is not whole
    working = list(root.glob("*/*/.working-*/checkpoint/step-*"))
    print(json.dumps({"event": event, "accepted": len(accepted), "checkpoints": len(working)} | outcome(job(root))))


def main(root: Path, mode: str, events: list[int]) -> None:
    if mode == "count":
        assert in_child(root / "whole", lambda: undisturbed(root / "whole")) == 0
    for event in events:
        folder = root / f"event-{event}"
        status = in_child(folder, lambda folder=folder, event=event: killed_at(folder, event))
        if not os.WIFSIGNALED(status):
            print(json.dumps({"event": event, "not_killed": status}))
            continue
        if in_child(folder, lambda folder=folder, event=event: resumed(folder, event)):
            print(json.dumps({"event": event, "not_resumed": True}))
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(event) for event in sys.argv[3:]])
