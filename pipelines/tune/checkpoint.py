"""The resumable state of a training: adapter or weights, AdamW moments, and how far it came.

A checkpoint is a folder `step-<number>` with safetensors and JSON, written under another name, flushed to disk and renamed,
so it is there whole or not at all. The two newest are kept; a damaged one is passed over for the one before it. Learning
rate, data position and random state follow from the step's number and the seed, so nothing else has to be stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runs import sync, write_text

if TYPE_CHECKING:
    import torch

PROGRESS_FILE = "progress.json"
TENSORS_FILE = "state.safetensors"
KEPT = 2


class Checkpoints:
    """The checkpoints of one training, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, done: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the state after `done` steps; older checkpoints go only when this one is on disk."""
        from safetensors.torch import save_file

        final = self.folder / f"step-{done:08d}"
        temporary = self.folder / f".{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(dict(tensors), temporary / TENSORS_FILE)
        sync(temporary / TENSORS_FILE)
        write_text(temporary / PROGRESS_FILE, json.dumps({"done": done, "sha256": _sha256(temporary / TENSORS_FILE)}))
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(temporary, final)
        sync(self.folder)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def newest(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Return (finished steps, tensors) of the newest whole checkpoint; (0, {}) if there is none."""
        from safetensors.torch import load_file

        for folder in reversed(self._all()):
            done = _valid(folder)
            if done is not None:
                return done, load_file(folder / TENSORS_FILE)
        return 0, {}

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _valid(folder: Path) -> int | None:
    """Return the number of finished steps if the checkpoint is whole, None otherwise."""
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        if progress["sha256"] != _sha256(folder / TENSORS_FILE):
            return None
        return int(progress["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
