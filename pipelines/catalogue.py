"""The catalogue: one file for each model of the document, read from configs/models/*.yaml.

A model has facts (what the document says and, where it differs or is silent, what the maker published). A model that
can be run here also has weights, a recipe and a rehearsal size. See `llmlab models` and `llmlab show NAME`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, Named, load_entry, names
from pipelines.errors import ConfigError

FACT_KEYS = (
    "developer", "launch", "license", "context_window", "parameters", "architecture", "key_features", "use_cases",
    "hands_on", "accuracy", "input_price", "output_price", "latency", "throughput",
)  # fmt: skip


PROVIDER_MODEL = r"^[a-z][a-z0-9_]*:[A-Za-z0-9][\w./:@-]*$"  # provider:model, as LangChain's init_chat_model takes it


class Fact(Config):
    """One statement about a model; `maker` is given only where the document is silent or says something else."""

    document: str | None = None
    maker: str | None = None

    @model_validator(mode="after")
    def _someone_says_it(self) -> Fact:
        if not (self.document or self.maker):
            raise ValueError("needs a statement of the document or of the maker")
        return self


class Dimensions(Config):
    """Shape of a decoder: enough to build it on the meta device or shrunk."""

    architecture: Literal["LlamaForCausalLM", "MistralForCausalLM"]
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    tied_embeddings: bool
    context_tokens: int = Field(gt=0)
    rope_theta: float = Field(gt=0)

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the size of keys and values of one token in 16 bits: two for each layer, as wide as the KV heads."""
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads)


class HubFiles(Config):
    """A hub repository at a pinned revision."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    download_bytes: int = Field(gt=0)


class Weights(HubFiles):
    """Where the weights come from: a hub repository at a pinned revision and, if one ships it, a Python package."""

    package: str | None = None
    package_file: str | None = None
    license_gate: Literal["none", "acceptable-use", "non-commercial", "research-only"]


class Tuning(Config):
    """How the model is tuned when the user names no recipe."""

    recipe: str
    target_modules: list[str] = Field(min_length=1)


class SpecialTokens(Config):
    """The tokens that a chat template relies on."""

    bos: str
    eos: str
    unknown: str


class Rehearsal(Config):
    """The size to which the architecture is shrunk when there are no weights."""

    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    chat_template: str
    special_tokens: SpecialTokens


class Model(Named):
    """A catalogue entry."""

    title: str
    facts: dict[str, Fact]
    weights: Weights | None = None
    dimensions: Dimensions | None = None
    tuning: Tuning | None = None
    rehearsal: Rehearsal | None = None
    provider: str | None = Field(default=None, pattern=PROVIDER_MODEL, description="its id where it is had through an API only")

    @model_validator(mode="after")
    def _keys_are_known(self) -> Model:
        unknown = sorted(set(self.facts) - set(FACT_KEYS))
        if unknown:
            raise ValueError(f"unknown facts {unknown}; known: {', '.join(FACT_KEYS)}")
        return self

    @property
    def runnable(self) -> bool:
        """True if the entry says how to obtain, tune and rehearse the model."""
        return None not in (self.weights, self.dimensions, self.tuning, self.rehearsal)

    @property
    def default_recipe(self) -> str:
        """Return the recipe that is used when the user names none."""
        if self.tuning is None:
            raise ConfigError(
                f"the catalogue does not say how {self.name} is tuned", "a runnable model", f"llmlab show {self.name}"
            )
        return self.tuning.recipe

    @property
    def target_modules(self) -> list[str]:
        """Return the names of the projections that get an adapter."""
        return list(self.tuning.target_modules) if self.tuning else []


@cache
def find(name: str) -> Model:
    """Return the model called `name`.

    Raises:
        UnknownName: with the valid names and the nearest one.
        ConfigError: the file does not fit the schema.
    """
    return load_entry("models", name, Model)


def all_models() -> list[Model]:
    """Return every model of the catalogue, by name."""
    return [find(name) for name in names("models")]


def runnable(name: str) -> Model:
    """Return a model that can be tuned and served here.

    Raises:
        ConfigError: the entry has facts only; lists the models that can be run.
    """
    model = find(name)
    if not model.runnable:
        ready = ", ".join(m.name for m in all_models() if m.runnable)
        way_on = f"llmlab show {name}" + (f", or llmlab serve {name} --engine provider" if model.provider else "")
        raise ConfigError(
            f"{name} has facts in the catalogue, but nothing that says how to run it yet", f"one of {ready}", way_on
        )
    return model
