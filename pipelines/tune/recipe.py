"""What a recipe file (configs/recipes/*.yaml) says: how to tune, independent of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, load, named


class Lora(Config):
    """Shape of the adapter (Hu et al. 2021, arXiv 2106.09685); the update is scaled by alpha / rank."""

    rank: int = Field(ge=1, le=256)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)


class Optimiser(Config):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: float = Field(gt=0, lt=1)
    lora_plus_ratio: float = Field(
        default=1, ge=1, le=64, description="lora_B learns so many times as fast as lora_A (LoRA+, arXiv 2402.12354)"
    )
    weight_decay: float = Field(ge=0)
    warmup_share: float = Field(ge=0, lt=1)
    max_gradient_norm: float = Field(gt=0)


class Schedule(Config):
    """How long to train, and on how much at a time; exactly one of `steps` and `epochs` is given."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0, description="passes over a file; a generated instruction set has no end")
    rows_per_step: int = Field(ge=1, description="effective batch, in rows (for dpo: pairs)")
    rows_per_prompt: int = Field(ge=1, description="at most so many rows share one computation of their common prompt")
    max_tokens: int = Field(ge=64, description="longest packed sequence; a row that is longer is an error, never cut")
    sequences_at_once: int = Field(ge=1, description="packed sequences computed together; the gradient stays the same")
    checkpointing: bool = Field(description="compute activations twice instead of keeping them")
    shard_weights: bool = Field(
        default=False, description="of several processes each keeps a share of every frozen layer; for plain weights (FSDP2)"
    )
    leave_out_over_tokens: int | None = Field(
        default=None, ge=16, description="if memory runs out otherwise, rows of a step that are longer may be left out"
    )
    checkpoint_every_steps: int = Field(ge=1)
    seed: int

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Preference(Config):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    beta: float = Field(gt=0, description="how strongly the policy is held to the reference")


class Recipe(Config):
    """One recipe."""

    method: Literal["lora", "qlora", "dora", "full", "dpo"]
    data: str = Field(description="a name in configs/data, the path of a file of rows, or of a folder of documents")
    held_out_share: float = Field(ge=0, lt=0.5, description="of the rows of a file, kept back for the proof afterwards")
    evaluation: str | None = Field(default=None, description="a file of rows that are held out in place of a share of the data")
    allow_overlap: bool = Field(default=False, description="train although rows of `evaluation` are among those to learn")
    lora: Lora | None = None
    preference: Preference | None = None
    optimiser: Optimiser
    schedule: Schedule

    @model_validator(mode="after")
    def _parts_fit_the_method(self) -> Recipe:
        if (self.lora is None) != (self.method in ("full", "dpo")):
            raise ValueError(f"method {self.method} takes {'no' if self.lora else 'a'} lora section" + (
                ": it goes on with the adapter of a run" if self.method == "dpo" else ""))  # fmt: skip
        if (self.preference is None) != (self.method != "dpo"):
            raise ValueError("a preference section belongs to method dpo, and to no other")
        if self.schedule.shard_weights and self.method not in ("lora", "dora"):
            raise ValueError(f"shard_weights goes with methods lora and dora: {self.method} has no plain, frozen base of its own")
        return self

    @property
    def quantised(self) -> bool:
        """Return True if the base is kept in 4 bits while it is tuned."""
        return self.method == "qlora"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read configs/recipes/<name>.yaml; `UnknownName` or `ConfigError` if that does not work."""
    return load(named("recipes", name), Recipe, overrides)
