"""The base of a model as one GGUF file in the catalogue's quantisation, for llama.cpp: as a package ships it, or made once.

Files that a user placed come first, then what a package ships, then what was fetched. What is made, of safetensors or of a
packaged file in another quantisation, lies in `LLMLAB_MODELS/<name>/gguf`, under a name that says of what and in which; changed
files get another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines import weights
from pipelines.catalogue import Model
from pipelines.export.convert import to_gguf
from pipelines.export.quantise import F16, is_in, quantise
from pipelines.runs import disk_trouble_is_explained

FOLDER = "gguf"


def base_gguf(model: Model, *, pull: bool, say: Callable[[str], object]) -> Path:
    """Return the base as GGUF, making it on first use where no package ships it in the catalogue's quantisation.

    Args:
        model: a runnable catalogue entry.
        pull: allow the weights to be fetched if they are not on disk.
        say: receives a line before a download, and before a file is made.

    Raises:
        WeightsMissing: not on disk, and not allowed or not possible to fetch.
        ExportFailed: llama.cpp does not know the architecture, or the converter is not installed.
        DiskFull: the file would not fit.
    """
    assert model.serving  # runnable
    quantisation, packaged = model.serving.quantisation, weights.packaged_gguf(model)
    source = weights.placed(model.name) or packaged or weights.obtain(model, pull=pull, say=say)
    if source == packaged and is_in(source, quantisation):
        return source
    file = weights.model_cache() / model.name / FOLDER / f"{_key(source)}.{quantisation}.gguf"
    if not file.is_file():
        say(f"making the base as GGUF in {quantisation}, once, which takes minutes for a large model: {file}")
        _make(source, file, quantisation)
    return file


def _make(source: Path, file: Path, quantisation: str) -> None:
    """Write `file` from a folder for `from_pretrained` or from a GGUF file; it appears once it is whole."""
    with disk_trouble_is_explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=file.parent) as scratch:
            precise, made = Path(scratch) / f"{F16}.gguf", Path(scratch) / file.name
            if source.is_dir():
                to_gguf(source, precise)
                source = precise
            quantise(source, made, quantisation, lambda *_: None)
            made.replace(file)


def _key(source: Path) -> str:
    """Return what tells one set of weights from another: the names, sizes and times of its files."""
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
