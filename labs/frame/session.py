"""What lab.py holds in its hands: `lab = begin("name")`, then cells that measure, and `lab.conclude(...)` in the last one.

The same lines run as a script (`python labs/NAME/lab.py`), by `llmlab lab run NAME`, and as a notebook. The quick form is
chosen by LLMLAB_QUICK=1; it takes seconds, shows that everything works, and its figures are never recorded.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from labs.frame import declared, needs
from labs.frame.declared import Lab
from labs.frame.verdict import FILE, PLOT, Result, Verdict
from labs.screen import say, table
from pipelines import runs
from pipelines.config import ROOT
from pipelines.errors import ConfigError

QUICK = "LLMLAB_QUICK"
REPORTS = ROOT / "reports" / "labs"
VERSIONS = ("torch", "transformers", "peft", "xllamacpp")
T = TypeVar("T")


@dataclass
class Session:
    """One run of a lab.

    Attributes:
        about: what the lab declares.
        quick: True in the form that takes seconds.
        fingerprint: of the lab as it was when this began, whatever is edited meanwhile.
        stack: what is undone once the lab has concluded.
        result: what was concluded; None before the last cell.
        folder: where it was written.
    """

    about: Lab
    quick: bool
    fingerprint: str
    began: float = field(default_factory=time.monotonic)
    stack: ExitStack = field(default_factory=ExitStack)
    result: Result | None = None
    folder: Path | None = None

    def pick(self, full: T, quick: T) -> T:
        """Return the value for this form of the lab."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Show one line of what is going on, with the seconds since the lab began."""
        say(f"[{time.monotonic() - self.began:5.0f} s] {text}")

    def own_folders(self) -> Path:
        """Keep runs and indexes of the lab apart from the user's, in a folder that is gone after the verdict; return it."""
        folder = Path(self.stack.enter_context(TemporaryDirectory()))
        for variable, name in (("LLMLAB_RUNS", "runs"), ("LLMLAB_INDEX", "index")):
            self.stack.callback(_set, variable, os.environ.get(variable))
            os.environ[variable] = str(folder / name)
        return folder

    def conclude(self, verdicts: Mapping[str, Verdict], plot: Any) -> Result:
        """Write the verdicts and the plot below reports/labs, show them, and return them.

        Args:
            verdicts: one for each claim, by its key.
            plot: a matplotlib `Figure`.

        Raises:
            ConfigError: a claim has no verdict, or a verdict no claim.
        """
        name, claims = self.about.name, self.about.claims
        if set(verdicts) != set(claims):
            raise ConfigError(f"lab {name} gives verdicts on {sorted(verdicts)}", f"one on each of {sorted(claims)}",
                              f"edit labs/{name}/{declared.SCRIPT} or {declared.DECLARED}")  # fmt: skip
        self.stack.close()
        ordered = {key: verdicts[key] for key in claims}
        self.result = Result(lab=name, fingerprint=self.fingerprint, form=self.pick("full", "quick"), verdicts=ordered,
                             machine=_machine(), versions=_versions(), date=f"{datetime.now(UTC):%Y-%m-%d}",
                             seconds=round(time.monotonic() - self.began, 1))  # fmt: skip
        self.folder = REPORTS / name / f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{self.result.form}"
        self.folder.mkdir(parents=True)
        runs.write_text(self.folder / FILE, as_json(self.result))
        plot.savefig(self.folder / PLOT, dpi=100, metadata={"Software": None})
        table(f"{self.about.title} ({self.result.form} form, {self.result.seconds:.0f} s)", ["claim", "verdict", "figure"],
              [[claims[key].text, v.state, v.figure] for key, v in ordered.items()])  # fmt: skip
        return self.result


def begin(name: str) -> Session:
    """Return a new session of the lab.

    Raises:
        UnknownName, ConfigError: there is no such lab, it is not declared as it should be, or what it needs is not here.
    """
    lab = declared.find(name)
    needs.check(name, lab.needs)
    return Session(lab, os.environ.get(QUICK) == "1", lab.fingerprint)


def as_json(result: Result) -> str:
    """Return a result as the text of its file."""
    return result.model_dump_json(indent=1) + "\n"


def _set(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _machine() -> str:
    from pipelines.hardware import probe

    found = probe()
    gpus = ", ".join(gpu.name for gpu in found.gpus) or "no GPU"
    return f"{found.cpus} CPU cores ({platform.machine()}), {found.memory_bytes / 2**30:.0f} GiB of memory, {gpus}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
