"""What a training does when memory runs out: the same step again, a rung further down a ladder.

Fewer sequences at once, then fewer rows in a sequence, then activations that are computed twice: the gradient of a step
stays what it was, only slower. The last rung leaves out long rows, and is there only if the recipe allows it. Each rung is
told to the user and kept beside the checkpoint, so that a resumed training goes on from it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.errors import OutOfMemory
from pipelines.runs import write_text
from pipelines.tune.packing import Packed, split
from pipelines.tune.recipe import Schedule

RUNG_FILE = "rung.json"
TEXTS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad allocation",
    "std::bad_alloc",
    "could not create a memory",
    "cannot allocate memory",
)  # fmt: skip - of allocators that have no error type


@dataclass(frozen=True)
class Rung:
    """How much of a step is held in memory.

    Attributes:
        sequences_at_once: packed sequences that are computed together.
        rows_per_sequence: at most so many rows in each; None leaves them as they were packed.
        checkpointing: activations are computed twice.
        longest: rows with more tokens are left out; None keeps them all.
    """

    sequences_at_once: int
    rows_per_sequence: int | None = None
    checkpointing: bool = False
    longest: int | None = None

    def __str__(self) -> str:
        """Say what it does, for a person."""
        parts = [f"{self.sequences_at_once} at once" if self.sequences_at_once > 1 else "one sequence at once"]
        parts += [f"at most {self.rows_per_sequence} rows in it"] if self.rows_per_sequence else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"rows over {self.longest} tokens left out"] if self.longest else []
        return ", ".join(parts)


def rungs(schedule: Schedule, rows: int, *, divisible: bool) -> Iterator[Rung]:
    """Yield the rungs from the top.

    Args:
        schedule: of the recipe; the first rung is what it says.
        rows: of the fullest sequence.
        divisible: the rows of a sequence may be computed apart.
    """
    rung = Rung(schedule.sequences_at_once, checkpointing=schedule.checkpointing)
    yield rung
    while rung.sequences_at_once > 1:
        rung = replace(rung, sequences_at_once=rung.sequences_at_once // 2)
        yield rung
    while divisible and rows > 1:
        rows = -(-rows // 2)
        rung = replace(rung, rows_per_sequence=rows)
        yield rung
    if not rung.checkpointing:
        rung = replace(rung, checkpointing=True)
        yield rung
    if schedule.leave_out_over_tokens and divisible:
        yield replace(rung, longest=schedule.leave_out_over_tokens)


class Ladder:
    """Where a training stands.

    Args:
        schedule: of the recipe.
        steps: every sequence that will be computed.
        divisible: the rows of a sequence may be computed apart.
        folder: where the rung is kept.
    """

    def __init__(self, schedule: Schedule, steps: Sequence[Sequence[Packed]], folder: Path, *, divisible: bool) -> None:
        self._all = list(rungs(schedule, max((p.rows for step in steps for p in step), default=1), divisible=divisible))
        self._kept = folder / RUNG_FILE
        self._at = self._read()

    @property
    def rung(self) -> Rung:
        """Return the rung that holds now."""
        return self._all[self._at]

    def down(self) -> Rung:
        """Go one rung down and return it.

        Raises:
            OutOfMemory: this was the last.
        """
        if self._at + 1 == len(self._all):
            raise OutOfMemory(f"memory ran out, also with {self.rung}", "room for one row at a time",
                              "a smaller model or recipe (llmlab plan MODEL RECIPE), --recipe qlora, or, to leave long rows "
                              "out, --set schedule.leave_out_over_tokens=512")  # fmt: skip
        self._at += 1
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._kept, json.dumps(asdict(self.rung)))
        return self.rung

    def divided(self, sequences: Sequence[Packed]) -> list[Packed]:
        """Return what is computed of a step: its sequences, taken apart, or without those that are too long."""
        rung = self.rung
        parts = [part for p in sequences for part in (split(p, rung.rows_per_sequence) if rung.rows_per_sequence else [p])]
        return [p for p in parts if rung.longest is None or len(p.tokens) <= rung.longest]

    def _read(self) -> int:
        try:
            return self._all.index(Rung(**json.loads(self._kept.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed from other errors; torch has a type of its own for a GPU only."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in TEXTS)


def release(model: Any) -> None:
    """Give back what a failed step left behind."""
    import torch

    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
