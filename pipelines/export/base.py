"""The base of a model as one GGUF file, for llama.cpp: as a package ships it, or made once of its safetensors.

Files that a user placed come first, then what a package ships, then what was fetched. What is made is in the catalogue's
quantisation and lies in `LLMLAB_MODELS/<name>/gguf`, under a name that says of what and in which; changed files get another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines import weights
from pipelines.catalogue import Model
from pipelines.export.convert import to_gguf
from pipelines.export.quantise import F16, quantise
from pipelines.runs import disk_trouble_is_explained

FOLDER = "gguf"


def base_gguf(model: Model, *, pull: bool, say: Callable[[str], object]) -> Path:
    """Return the base as GGUF, making it on first use where no package ships it.

    Args:
        model: a runnable catalogue entry.
        pull: allow the weights to be fetched if they are not on disk.
        say: receives a line before a download, and before a file is made.

    Raises:
        WeightsMissing: not on disk, and not allowed or not possible to fetch.
        ExportFailed: llama.cpp does not know the architecture, or the converter is not installed.
        DiskFull: the file would not fit.
    """
    folder, packaged = weights.placed(model.name), weights.packaged_gguf(model)
    if packaged and not folder:
        return packaged
    assert model.serving  # runnable
    folder, quantisation = folder or weights.obtain(model, pull=pull, say=say), model.serving.quantisation
    file = weights.model_cache() / model.name / FOLDER / f"{_key(folder)}.{quantisation}.gguf"
    if not file.is_file():
        say(f"making the base as GGUF in {quantisation}, once, which takes minutes for a large model: {file}")
        _make(folder, file, quantisation)
    return file


def _make(folder: Path, file: Path, quantisation: str) -> None:
    """Write `file` from a folder for `from_pretrained`; it appears once it is whole."""
    with disk_trouble_is_explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=file.parent) as scratch:
            precise, made = Path(scratch) / f"{F16}.gguf", Path(scratch) / file.name
            to_gguf(folder, precise)
            quantise(precise, made, quantisation, lambda *_: None)
            made.replace(file)


def _key(folder: Path) -> str:
    """Return what tells one set of weights from another: the names, sizes and times of its files."""
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
