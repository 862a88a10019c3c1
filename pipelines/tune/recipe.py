"""What a recipe file (configs/recipes/*.yaml) says: how to tune, independent of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipelines.config import Config, load, named


class Lora(Config):
    """Shape of the adapter (Hu et al. 2021, arXiv 2106.09685); the update is scaled by alpha / rank."""

    rank: int = Field(ge=1, le=256)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)


class Optimiser(Config):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: float = Field(gt=0, lt=1)
    weight_decay: float = Field(ge=0)
    warmup_share: float = Field(ge=0, lt=1)
    max_gradient_norm: float = Field(gt=0)


class Schedule(Config):
    """How long to train; a group is one set of passages with all its questions."""

    steps: int = Field(ge=1)
    groups_per_step: int = Field(ge=1)
    questions_per_group: int = Field(ge=1)
    max_tokens: int = Field(ge=64, description="longest group, in tokens; a longer one is an error, never cut")
    checkpoint_every_steps: int = Field(ge=1)
    seed: int


class Recipe(Config):
    """One recipe."""

    method: Literal["lora", "qlora"]
    data: str
    lora: Lora
    optimiser: Optimiser
    schedule: Schedule


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read configs/recipes/<name>.yaml; `UnknownName` or `ConfigError` if that does not work."""
    return load(named("recipes", name), Recipe, overrides)
