"""Run a lab as the script it is, in this process: `llmlab lab run NAME`; with `--record` its result becomes the known one."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from labs.frame import collected, declared
from labs.frame.session import QUICK, Session
from labs.frame.verdict import FILE, PLOT
from pipelines.errors import ConfigError, LabError


def run(name: str, *, quick: bool, record: bool) -> Session:
    """Run a lab and return its session, which holds the result and the folder that it was written to.

    Args:
        name: of the lab.
        quick: in the form that takes seconds.
        record: put verdict.json and plot.png into the lab's folder and write VERDICTS.md anew.

    Raises:
        UnknownName, ConfigError: there is no such lab, it lacks something, or a quick form was to be recorded.
        LabError: the script ended without a verdict, or what it calls failed.
    """
    lab = declared.find(name)
    if quick and record:
        raise ConfigError("--record with --quick: the quick form's figures are too few to be kept", "the full form",
                          f"llmlab lab run {name} --record")  # fmt: skip
    with _form(quick):
        session = runpy.run_path(str(lab.folder / declared.SCRIPT), run_name="__main__").get("lab")
    if not isinstance(session, Session) or session.result is None or session.folder is None:
        raise LabError(f"labs/{name}/{declared.SCRIPT} ended without a verdict", "lab = begin(...) and lab.conclude(...)",
                       f"edit labs/{name}/{declared.SCRIPT}")  # fmt: skip
    if record:
        for file in (FILE, PLOT):
            shutil.copyfile(session.folder / file, lab.folder / file)
        collected.write()
    return session


@contextmanager
def _form(quick: bool) -> Iterator[None]:
    """Tell the script which form is wanted; the variable is as it was afterwards."""
    before = os.environ.get(QUICK)
    os.environ[QUICK] = "1" if quick else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUICK]
        else:
            os.environ[QUICK] = before
