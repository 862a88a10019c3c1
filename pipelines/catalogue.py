"""The catalogue: one file for each model of the document, read from configs/models/*.yaml.

A model has facts (what the document says and, where it differs or is silent, what the maker published). An open model also
has weights, the configuration of its architecture, how it is tuned and served, and a size to rehearse it in. A sibling says
`like: NAME` and what differs. Adding a model is adding a file. See `llmlab models` and `llmlab show NAME`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, Named, load_entry, names
from pipelines.errors import ConfigError

FACT_KEYS = (
    "developer", "launch", "license", "context_window", "parameters", "architecture", "key_features", "use_cases",
    "hands_on", "accuracy", "input_price", "output_price", "latency", "throughput",
)  # fmt: skip


RUNNABLE = ("weights", "context_tokens", "config", "tuning", "serving", "chat_template", "rehearsal")
REVISION = r"^[0-9a-f]{40}$"
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


class HubFiles(Config):
    """A hub repository at a pinned revision."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=REVISION)
    download_bytes: int = Field(gt=0)


class Weights(Config):
    """Where the weights come from: a hub repository and, if one ships it, a Python package."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(default=None, pattern=REVISION, description="none: the newest is fetched, and its commit kept")
    parameters_billions: float = Field(gt=0, description="as published; a test holds the architecture to it")
    download_bytes: int | None = Field(default=None, gt=0, description="none: 16 bits for each parameter")
    package: str | None = None
    package_file: str | None = None
    license_gate: Literal["none", "acceptable-use", "non-commercial", "research-only"]

    @property
    def size_bytes(self) -> int:
        """Return what has to be fetched, or the nearest to it that is known."""
        return self.download_bytes or round(self.parameters_billions * 2e9)


class Tuning(Config):
    """How the model is tuned when the user names no recipe."""

    recipe: str
    target_modules: list[str] = Field(min_length=1, description="projections that get an adapter")
    expert_parameters: list[str] = Field(default=[], description="stacked weights of experts that get one too")
    frozen: list[str] = Field(default=[], description="parts of the model that get none, whatever their projections are called")


class Serving(Config):
    """Which engines know the architecture, and the GGUF quantisation that llama.cpp serves and an export makes."""

    engines: list[Literal["llamacpp", "vllm"]]
    quantisation: str


class SpecialTokens(Config):
    """The tokens that a chat template relies on; `others` are those that begin and end a turn, or stand for an image."""

    bos: str | None
    eos: str
    unknown: str | None
    pad: str | None = None
    others: list[str] = []
    named: dict[str, str] = Field(default={}, description="of these, the ones that a processor of images asks for by a name")


class Rehearsal(Config):
    """What is put over `config` when there are no weights, and how the family cuts text into tokens."""

    config: dict[str, Any]
    tokenizer: Literal["bytes", "pieces"] = Field(description="byte-level BPE as GPT-2's, or SentencePiece's with byte fallback")
    special_tokens: SpecialTokens
    token_ids: dict[str, str] | None = Field(default=None, description="fields of `config` that are the id of a token")


class Model(Named):
    """A catalogue entry; one that is `like` another is a sibling of it, and no row of the document."""

    title: str
    like: str | None = None
    facts: dict[str, Fact]
    modality: list[Literal["text", "image"]] = Field(min_length=1, description="what it reads")
    weights: Weights | None = None
    context_tokens: int | None = Field(default=None, gt=0, description="longest text that it was made for")
    config: dict[str, Any] | None = Field(default=None, description="of transformers, with its model_type")
    tuning: Tuning | None = None
    serving: Serving | None = None
    chat_template: str | None = None
    rehearsal: Rehearsal | None = None
    provider: str | None = Field(default=None, pattern=PROVIDER_MODEL, description="its id where it is had through an API only")

    @model_validator(mode="after")
    def _keys_are_known(self) -> Model:
        unknown = sorted(set(self.facts) - set(FACT_KEYS))
        if unknown:
            raise ValueError(f"unknown facts {unknown}; known: {', '.join(FACT_KEYS)}")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, by which transformers knows the architecture")
        if self.weights and not self.runnable:
            missing = [name for name in RUNNABLE if getattr(self, name) is None]
            raise ValueError(f"an open model needs {', '.join(missing)} too")
        return self

    @property
    def runnable(self) -> bool:
        """True if the entry says how to obtain, tune and rehearse the model; so it is open."""
        return all(getattr(self, name) is not None for name in RUNNABLE)

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


def document_rows() -> list[Model]:
    """Return the rows of the document, by name: every model that is not a sibling of another."""
    return [model for model in all_models() if model.like is None]


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
