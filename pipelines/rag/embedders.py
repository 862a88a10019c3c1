"""The catalogue of embedders: one file for each, read from configs/embedders/*.yaml, and where its weights are.

An embedder is added by adding a file. Its weights are in a Python package, in a folder of the user's, or on a hub at a pinned
revision, and then only `llmlab pull NAME` fetches them. How texts become vectors is in pipelines.rag.embed.
Run: llmlab index embedders
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from pipelines.config import load_entry, names
from pipelines.errors import ConfigError
from pipelines.rag.places import Entry, obtain, on_disk

_READ_MODULES = {"Transformer", "Pooling", "Normalize"}
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # their first position is not 0

T = TypeVar("T", dict[str, Any], list[Any])


class EmbedderConfig(Entry):
    """A catalogue entry. Vectors are always brought to length 1, since all search here is by the cosine."""

    catalogue = "embedders"
    kind: Literal["transformers", "int8", "static"] = Field(description="a model, one in 8 bits, or a table of token vectors")
    weights_file: str = Field("model.safetensors", pattern=r"\.safetensors$", description="inside the folder")
    tokenizer_file: str = Field("tokenizer.json", description="inside the folder")
    pooling: Literal["mean", "cls"] = Field(description="of the tokens' vectors; cls takes that of the first")
    dimension: int = Field(ge=1)
    query_prefix: str = Field(description="what the model wants before a question")
    passage_prefix: str = Field(description="what it wants before a passage")

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
    found = load_entry(EmbedderConfig.catalogue, name, EmbedderConfig)
    if found.kind == "static" and found.pooling != "mean":
        raise ConfigError(f"configs/embedders/{name}.yaml: a table of token vectors has no first token", "pooling: mean")
    return found


def here() -> list[str]:
    """Return the names of the embedders whose weights are on this machine, sorted."""
    return [name for name in names("embedders") if on_disk(find(name))]


def folder_of(entry: EmbedderConfig, *, pull: bool = False, say: Callable[[str], object] = str) -> Path:
    """Return the folder of an entry's files, after a look at whether they are what the entry says.

    Args:
        entry: of the catalogue.
        pull: whether the pinned revision may be fetched.
        say: receives one line before a download starts.

    Raises:
        WeightsMissing: a file is not there, and not allowed or not possible to fetch.
        DiskFull: the download would not fit.
        ConfigError: the model would be read in another way than its own files say.
    """
    folder = obtain(entry, pull=pull, say=say)
    if entry.kind != "static":
        _check_agreement(entry, folder)
    return folder


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
