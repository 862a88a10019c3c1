"""The training loop: interruptions, checkpoints, losses that are not finite."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import TrainingFailed
from pipelines.tune.checkpoint import TENSORS_FILE
from pipelines.tune.packing import Packed
from pipelines.tune.training import Step
from tests.pipelines.tune.conftest import tiny_training


@pytest.fixture(scope="module")
def whole(tiny: Path, trees: list[Packed], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Step]]:
    """An uninterrupted training."""
    steps: list[Step] = []
    training = tiny_training(tiny, trees, tmp_path_factory.mktemp("whole"))
    training.run(steps.append)
    return training, steps


def test_an_interrupted_training_resumes_to_the_same_bits(tiny: Path, trees: list[Packed], whole: Any, tmp_path: Path) -> None:
    import torch

    def interrupt(step: Step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_training(tiny, trees, tmp_path).run(interrupt)
    resumed = tiny_training(tiny, trees, tmp_path)
    assert resumed.first_step == 5
    steps: list[Step] = []
    resumed.run(steps.append)
    assert [(s.step, s.loss, s.gradient_norm) for s in steps] == [(s.step, s.loss, s.gradient_norm) for s in whole[1][5:]]
    for name, parameter in whole[0].trained.items():
        assert torch.equal(parameter, resumed.trained[name]), name


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tiny: Path, trees: list[Packed], whole: Any, tmp_path: Path
) -> None:
    tiny_training(tiny, trees, tmp_path).run(lambda _: None)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000006", "step-00000008"]
    with (tmp_path / "step-00000008" / TENSORS_FILE).open("r+b") as stream:
        stream.seek(2000)
        stream.write(b"x")
    resumed = tiny_training(tiny, trees, tmp_path)
    assert resumed.first_step == 6
    steps: list[Step] = []
    resumed.run(steps.append)
    assert [s.loss for s in steps] == [s.loss for s in whole[1][6:]]
    for checkpoint in tmp_path.iterdir():
        (checkpoint / TENSORS_FILE).unlink()
    assert tiny_training(tiny, trees, tmp_path).first_step == 0


def test_a_training_without_checkpoint_starts_at_the_beginning(tiny: Path, trees: list[Packed], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    assert tiny_training(tiny, trees, tmp_path).first_step == 0


def test_a_loss_that_is_not_finite_ends_the_training(tiny: Path, trees: list[Packed], tmp_path: Path) -> None:
    training = tiny_training(tiny, trees, tmp_path)
    next(iter(training.trained.values())).data.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="loss is nan"):
        training.run(lambda _: None)


def test_loraplus_makes_the_steps_of_peft(tiny: Path, trees: list[Packed], tmp_path: Path) -> None:
    """PEFT's own optimiser, given the same gradients and learning rates."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    training = tiny_training(tiny, trees, tmp_path, "optimiser.lora_plus_ratio=8", "optimiser.max_gradient_norm=1e9")
    other = tiny_training(tiny, trees, tmp_path / "other")
    theirs = create_loraplus_optimizer(other.model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=8, weight_decay=0.0)
    ratio = [group["lr"] for group in theirs.param_groups]
    assert set(ratio) == {1.0, 8.0, 1e-6}  # the last is for embeddings, of which none is trained
    taken: list[Step] = []
    training.run(taken.append)
    for step in taken:
        other._gradient(step.step - 1)
        for group, times in zip(theirs.param_groups, ratio, strict=True):
            group["lr"] = step.learning_rate * times
        theirs.step()
        theirs.zero_grad()
    for name, parameter in training.trained.items():
        assert torch.allclose(parameter, other.trained[name], atol=1e-6), name
