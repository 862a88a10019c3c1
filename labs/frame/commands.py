"""`llmlab labs` and `llmlab lab`: list the labs, run one, open it as a notebook, write the page of verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

lab_app = typer.Typer(no_args_is_help=True, help="One lab. Example: llmlab lab run mistral-v-mixtral --quick")
LabName = Annotated[str, typer.Argument(metavar="NAME", help="A name from `llmlab labs`.")]


def labs() -> None:
    """List the labs: what each claims, how long it takes, what it needs, and the verdicts that are recorded."""
    from labs.frame import collected, declared, needs
    from labs.frame.verdict import FAILS, HOLDS, UNKNOWN
    from labs.screen import say, table

    rows = []
    for lab in declared.all_labs():
        result, lacking = collected.recorded(lab), needs.missing(lab.needs)
        states = [v.state for v in result.verdicts.values()] if result else []
        counted = [f"{states.count(state)} {state}" for state in (HOLDS, FAILS, UNKNOWN) if state in states]
        rows.append([lab.name, lab.title, f"{lab.minutes:g}", "; ".join(n.command for n in lacking) or "nothing",
                     ", ".join(counted) or "not recorded"])  # fmt: skip
    table("Labs", ["name", "what it is about", "minutes", "lacks", "last recorded verdicts"], rows, names_whole=True)
    say("llmlab lab run NAME (--quick: seconds); all verdicts: labs/VERDICTS.md")


@lab_app.command()
def run(
    name: LabName,
    quick: Annotated[bool, typer.Option("--quick", help="The form that takes seconds; shows that it works.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Keep the result in the lab's folder and in VERDICTS.md.")] = False,
) -> None:
    """Measure a lab's claims and give a verdict on each; the last line is JSON. Example: llmlab lab run alibi-long-context."""
    from labs.frame.running import run as measure
    from labs.screen import json_line, say

    session = measure(name, quick=quick, record=record)
    assert session.result
    say(f"verdict and plot are in {session.folder}" + ("; recorded in labs/VERDICTS.md" if record else ""))
    json_line(session.result.model_dump())


@lab_app.command()
def notebook(
    name: LabName,
    to: Annotated[Path | None, typer.Option("--output", "-o", help="The notebook; reports/labs/NAME.ipynb if not given.")] = None,
) -> None:
    """Write a lab as a Jupyter notebook. Example: llmlab lab notebook alibi-long-context -o alibi.ipynb."""
    from labs.frame.notebook import write
    from labs.frame.session import REPORTS
    from labs.screen import say

    say(f"wrote {write(name, to or REPORTS / f'{name}.ipynb')}")


@lab_app.command()
def verdicts(check: Annotated[bool, typer.Option("--check", help="Only compare; fail if the page differs.")] = False) -> None:
    """Write labs/VERDICTS.md from the recorded verdicts of all labs."""
    from labs.frame import collected
    from labs.screen import say

    if check:
        collected.check()
    else:
        say(f"wrote {collected.write()}")
