"""When memory runs out: a process that the system really limits goes down the ladder, and learns the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import ROOT
from pipelines.errors import OutOfMemory
from pipelines.tune.adapter import checkpoint_activations
from pipelines.tune.memory import RUNG_FILE, Ladder, Rung, is_out_of_memory, rungs
from pipelines.tune.packing import Packed, collate, fit, split
from pipelines.tune.sft import Supervised, label_loss
from pipelines.tune.training import Step, Training
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe
from tests.pipelines.tune.test_packing import gradients

LIMITED = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from pipelines.errors import LabError
from pipelines.tune.packing import Packed, tree, Encoded
from pipelines.tune.sft import Supervised
from pipelines.tune.training import Training
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe
room, prompt, folder, checkpoint, *overrides = sys.argv[1:]
torch.set_num_threads(1)
recipe = tiny_recipe("schedule.steps=3", *overrides)
model = tiny_model(Path(folder), recipe)
shared = [None] * int(prompt)
rows = [[Encoded([s + 5] * len(shared) + [100 + row] * 24, [*shared, *[None] * 23, 11]) for row in range(48)] for s in range(4)]
steps = [[tree(of_one_prompt) for of_one_prompt in rows]] * 3
training = Training(model, steps, recipe, Supervised(2), Path(checkpoint), say=print)
training.objective.total(model, [tree([Encoded([7, 8], [None, 9])])]).backward()  # the libraries take what they need
model.zero_grad()
if room != "all":
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + int(room) * 2**20, -1))
losses = []
try:
    training.run(lambda step: losses.append((step.loss, step.gradient_norm)))
except LabError as error:
    print(type(error).__name__, error)
print(json.dumps(losses))
"""


def limited(room: str, prompt: int, tiny: Path, folder: Path) -> tuple[list[str], list[list[float]]]:
    """Train in a process that may take `room` MiB more than it has; return what it says and (loss, norm) of each step.

    A step has 4 sequences of 48 rows, behind a prompt of `prompt` tokens each; all 4 are to be computed at once.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, room, str(prompt), str(tiny), str(folder), "schedule.sequences_at_once=4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


@pytest.mark.slow
def test_a_training_without_room_goes_down_the_ladder_and_learns_the_same(tiny: Path, tmp_path: Path) -> None:
    _, free = limited("all", 40, tiny, tmp_path / "free")
    lines, tight = limited("60", 40, tiny, tmp_path / "tight")
    assert len(free) == len(tight) == 3
    assert any("memory ran out in step 1; the same step again with 2 at once" in line for line in lines), lines
    for (loss, norm), (expected, expected_norm) in zip(tight, free, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    kept = json.loads((tmp_path / "tight" / RUNG_FILE).read_text())
    assert kept["sequences_at_once"] < 4
    assert str(Rung(**kept)) in lines[-1]


@pytest.mark.slow
def test_without_any_room_it_ends_with_a_message(tiny: Path, tmp_path: Path) -> None:
    lines, losses = limited("8", 4000, tiny, tmp_path)
    assert losses == []
    text = "\n".join(lines)
    assert "with one sequence at once, at most 1 rows in it, checkpointing" in text
    assert "OutOfMemory memory ran out" in text and "llmlab plan" in text


def test_the_ladder_keeps_the_effective_batch_and_forgets_nothing(tmp_path: Path, trees: list[Packed]) -> None:
    recipe = tiny_recipe("schedule.sequences_at_once=2", "schedule.leave_out_over_tokens=64")
    steps = [trees[:3]]
    rows = max(t.rows for t in trees[:3])
    ladder = Ladder(recipe.schedule, steps, tmp_path, divisible=True)
    seen = [ladder.rung]
    while True:
        try:
            seen.append(ladder.down())
        except OutOfMemory as error:
            assert "rows over 64 tokens left out" in str(error)
            break
        if seen[-1].longest is None:
            assert sum(p.rows for p in ladder.divided(steps[0])) == sum(t.rows for t in trees[:3])
        assert Ladder(recipe.schedule, steps, tmp_path, divisible=True).rung == seen[-1]  # a resumed training
    assert seen == list(rungs(recipe.schedule, rows, divisible=True))
    assert [r.sequences_at_once for r in seen[:2]] == [2, 1]
    assert [r.checkpointing for r in seen] == [False] * (len(seen) - 2) + [True, True]
    assert list(rungs(recipe.schedule, rows, divisible=False)) == [Rung(2), Rung(1), Rung(1, checkpointing=True)]


def test_long_rows_are_left_out_only_if_the_recipe_says_so() -> None:
    assert all(rung.longest is None for rung in rungs(tiny_recipe().schedule, 8, divisible=True))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_sequence_taken_apart_has_the_same_loss_and_gradient(rows: int, tiny: Path, trees: list[Packed]) -> None:
    model = tiny_model(tiny, tiny_recipe())
    sequence = fit(trees[:3], 4096)[0]
    parts = split(sequence, rows)
    assert sum(p.rows for p in parts) == sequence.rows and max(p.rows for p in parts) == rows
    whole = gradients(model, lambda: label_loss(model, collate([sequence], 2)))
    apart = gradients(model, lambda: sum(label_loss(model, collate([p], 2)) for p in parts))
    assert apart[0] == pytest.approx(whole[0], rel=1e-5)
    for name, gradient in whole[1].items():
        assert (apart[1][name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_other_errors_are_not_taken_for_memory() -> None:
    import torch

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied")) and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value), caught.value


def test_the_loss_without_long_rows_is_the_mean_of_the_others(tiny: Path, trees: list[Packed], tmp_path: Path) -> None:
    import torch

    longest = sorted(len(part.tokens) for t in trees[:2] for part in split(t, 1))[3]
    recipe = tiny_recipe("schedule.steps=1", f"schedule.leave_out_over_tokens={longest}")
    training = Training(tiny_model(tiny, recipe), [trees[:2]], recipe, Supervised(2), tmp_path)
    while training.ladder.rung.longest is None:
        training.ladder.down()
    kept = [part for t in trees[:2] for part in split(t, 1) if len(part.tokens) <= longest]
    with torch.no_grad():
        expected = sum(float(label_loss(training.model, collate([p], 2))) for p in kept) / sum(p.supervised for p in kept)
    steps: list[Step] = []
    training.run(steps.append)
    assert steps[0].loss == pytest.approx(expected, rel=1e-5)
    assert steps[0].rows == len(kept) < sum(t.rows for t in trees[:2])


def test_checkpointing_gives_the_same_bits(tiny: Path, trees: list[Packed]) -> None:
    """So a job may switch it on when memory is short, and off when it is resumed."""
    import torch

    found = []
    for checkpointing in (False, True):
        model = tiny_model(tiny, tiny_recipe("lora.dropout=0.1")).train()
        if checkpointing:
            checkpoint_activations(model)
        torch.manual_seed(3)
        found.append(gradients(model, lambda model=model: label_loss(model, collate(trees[:1], 2))))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
