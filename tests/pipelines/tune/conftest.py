"""What the tests of tuning share: a shrunk Llama with random weights, its tokenizer, and groups of the instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import catalogue
from pipelines.tune import adapter, data, rehearsal, training
from pipelines.tune.finetune import load_base
from pipelines.tune.groups import training_groups
from pipelines.tune.packing import Packed, encode, tree
from pipelines.tune.recipe import Recipe, load_recipe
from pipelines.tune.sft import Supervised
from tests.conftest import MODEL


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shrunk Llama with its tokenizer, as the rehearsal makes it."""
    return rehearsal.build(catalogue.runnable(MODEL), rehearsal.texts(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def groups() -> list[list[data.Example]]:
    config = data.load_reader()
    corpus, _ = data.corpora(config)
    return list(training_groups(config, corpus, 12, 5, seed=3))


@pytest.fixture(scope="session")
def trees(groups: list[list[data.Example]], tokenizer: Any) -> list[Packed]:
    return [tree([encode(e.row, tokenizer) for e in group]) for group in groups]


def tiny_recipe(*overrides: str) -> Recipe:
    return load_recipe("lora-quick", ["schedule.steps=8", "schedule.checkpoint_every_steps=3", *overrides])


def tiny_model(tiny: Path, recipe: Recipe) -> Any:
    import torch

    torch.manual_seed(0)
    assert recipe.lora
    return adapter.attach(
        load_base(tiny, "cpu", quantised=False), recipe.lora, catalogue.find(MODEL).target_modules, quantised=False
    )


def tiny_training(tiny: Path, trees: list[Packed], checkpoint: Path, *overrides: str) -> training.Training:
    """A training of 8 steps with one group each, from the same random weights every time."""
    recipe = tiny_recipe(*overrides)
    return training.Training(tiny_model(tiny, recipe), [[t] for t in trees[:8]], recipe, Supervised(2), checkpoint)
