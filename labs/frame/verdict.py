"""The result of a lab: a verdict on each of its claims, with the figure that decides it and how it was measured.

The last full measurement that was recorded lies in the lab's folder, verdict.json beside plot.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipelines.config import Config
from pipelines.errors import RunIncomplete

State = Literal["holds", "does not hold", "cannot be measured here"]
HOLDS: State = "holds"
FAILS: State = "does not hold"
UNKNOWN: State = "cannot be measured here"
FILE, PLOT = "verdict.json", "plot.png"


class Verdict(Config):
    """On one claim."""

    state: State
    figure: str = Field(min_length=1, description="the numbers that decide, or why there are none")
    how: str = Field(min_length=1, description="on what and how they were measured")
    values: dict[str, float] = Field(default={}, description="the same numbers, for programs; units in the names")


class Result(Config):
    """Of one run of a lab."""

    lab: str
    fingerprint: str = Field(description="of the lab that was run, `Lab.fingerprint`")
    form: Literal["quick", "full"]
    verdicts: dict[str, Verdict] = Field(min_length=1)
    machine: str
    versions: dict[str, str]
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    seconds: float = Field(ge=0)


def judged(condition: bool, figure: str, how: str, **values: float) -> Verdict:
    """Return the verdict that a measured condition gives: it holds, or it does not."""
    return Verdict(state=HOLDS if condition else FAILS, figure=figure, how=how, values={k: float(v) for k, v in values.items()})


def not_here(why: str, how: str) -> Verdict:
    """Return the verdict on a claim that this machine cannot put to the test, with the reason and what would."""
    return Verdict(state=UNKNOWN, figure=why, how=how)


def read(folder: Path) -> Result | None:
    """Return the recorded result in a folder, None if there is none.

    Raises:
        RunIncomplete: the file is not what a lab writes, or its plot is missing.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    again = f"llmlab lab run {folder.name} --record"
    if not (folder / PLOT).is_file():
        raise RunIncomplete(f"{folder.name}/{FILE} has no {PLOT} beside it", "both files of a recorded run", again)
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RunIncomplete(f"{folder.name}/{FILE} is not a result: {error.errors()[0]['msg']}", "what a lab writes",
                            again) from None  # fmt: skip
