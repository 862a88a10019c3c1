"""`llmlab dashboards`: write the boards and the generated rules, compare them, or draw a board without Grafana."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipelines.config import unknown
from pipelines.errors import ConfigError, EngineError, LabError

dashboards_app = typer.Typer(help="Grafana's dashboards, written from the declared metrics, and drawn without Grafana.")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PROMETHEUS = "http://127.0.0.1:9090"


@dashboards_app.callback(invoke_without_command=True)
def dashboards(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Only compare; fail if a file differs.")] = False,
) -> None:
    """Write the dashboards and rules from the declared metrics; `render` draws one of them."""
    if context.invoked_subcommand:
        return
    from labs.screen import say
    from monitoring.dashboards import files

    if not check:
        say("wrote " + ", ".join(path.name for path in files.write()))
    elif stale := files.check():
        names = ", ".join(path.name for path in stale)
        raise LabError(f"dashboards or rules differ from their code: {names}", "the generated files", "make dashboards")


@dashboards_app.command()
def render(
    name: Annotated[str, typer.Argument(metavar="BOARD", help="overview, serving, rag, training or hardware.")],
    prometheus: Annotated[str, typer.Option(help="Address of a running Prometheus.")] = PROMETHEUS,
    since: Annotated[str, typer.Option(help="How far back: 90s, 30m, 6h, 2d.")] = "30m",
    to: Annotated[Path | None, typer.Option("--output", "-o", help="A .png or .html file; BOARD.png if not given.")] = None,
) -> None:
    """Draw a board from a running Prometheus. Example: llmlab dashboards render overview --since 30m -o overview.html."""
    from labs.screen import say
    from monitoring.dashboards.boards import BOARDS
    from monitoring.dashboards.draw import draw
    from monitoring.queries import NoAnswer

    board = next((board for board in BOARDS if board.name == name), None)
    if board is None:
        raise unknown("board", name, [board.name for board in BOARDS])
    path = to or Path(f"{name}.png")
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"-o {path}", "a file that ends in .png or .html", f"-o {name}.png")
    try:
        say(f"wrote {draw(board, prometheus, seconds_of(since), path)}")
    except NoAnswer as problem:
        raise EngineError(str(problem), "a running Prometheus", "make monitor") from None
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror}", "a path that can be written") from None


def seconds_of(text: str) -> float:
    """Return the seconds of a time like 30m.

    Raises:
        ConfigError: it is none, or not between a second and 31 days.
    """
    found = re.fullmatch(r"(\d{1,7})([smhd])", text)
    seconds = int(found[1]) * UNITS[found[2]] if found else 0
    if not 1 <= seconds <= 31 * UNITS["d"]:
        raise ConfigError(f"--since {text}", "a number with s, m, h or d, up to 31d", "--since 30m")
    return float(seconds)
