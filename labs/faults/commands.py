"""`llmlab break`: plant a fault in a stack of its own, take a hint, and have a diagnosis graded."""

from __future__ import annotations

from typing import Annotated

import typer

PLANTED = "the fault that is planted now"


def break_(
    fault: Annotated[
        str | None, typer.Argument(metavar="[FAULT]", help="A name of the list, or random for one that is not told.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the faults that there are, and not where they show.")] = False,
    hint: Annotated[bool, typer.Option("--hint", help=f"Tell a little about {PLANTED}; more each time.")] = False,
    check: Annotated[str | None, typer.Option(metavar="FAULT", help=f"Grade this diagnosis of {PLANTED}.")] = None,
    panel: Annotated[str | None, typer.Option(help="With --check: the panel or the alert that shows it.")] = None,
) -> None:
    """Break a stack made for it, on loopback and in a temporary folder, and find out what is wrong from dashboards and logs.

    It runs until Ctrl-C; ask for hints and grades in another terminal. A wrong diagnosis ends with status 1.

    Examples: llmlab break random; llmlab break --hint; llmlab break --check dead-engine --panel "Engine up"
    """
    from labs.faults import lesson
    from labs.faults.table import FAULTS
    from labs.screen import say, table
    from pipelines.errors import ConfigError

    if sum([fault is not None, list_, hint, check is not None]) > 1 or (panel is not None and check is None):
        raise ConfigError("these options do not go together", "one of FAULT, --list, --hint, --check FAULT [--panel TITLE]",
                          "llmlab break --help")  # fmt: skip
    if hint:
        say(lesson.hint())
    elif check is not None:
        grade = lesson.check(check, panel)
        for line in grade.lines:
            say(line)
        if not grade.right:
            raise typer.Exit(1)
    elif fault is not None:
        lesson.run(fault, say)
    else:
        table("What can be wrong", ["fault"], [[name] for name in sorted(each.name for each in FAULTS)], names_whole=True)
        say("llmlab break random plants one of them; llmlab break FAULT this one")
