"""How the command line shows things: tables, progress bars, errors. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.plan import Plan
from pipelines.tune.training import Step

OUT = Console(soft_wrap=True, highlight=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Show one line of what is going on, on stderr."""
    ERR.print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, names_whole: bool = False) -> None:
    """Print a table on stdout; with `names_whole` no cell of the first column is folded."""
    shown = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        shown.add_column(column, overflow="fold", no_wrap=names_whole and not place)
    for row in rows:
        shown.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=max(OUT.width, 100), highlight=False).print(shown, markup=False)


def json_line(content: Any) -> None:
    """Print one JSON document as the last line of a measuring command."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


class TuningScreen:
    """Follows a tuning job: the plan as a table, training as a progress bar with loss, tokens/s and time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tok/s  {task.fields[left]} left"), console=ERR,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> TuningScreen:
        """Show nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last state of the bar on the screen."""
        self._progress.stop()

    def say(self, text: str) -> None:
        """Show one line."""
        say(text)

    def plan(self, plan: Plan) -> None:
        """Show the plan, before anything is loaded."""
        table(f"Plan: {plan.model}, {plan.method}", ["what", "need"], plan.rows())

    def begin(self, model: str, recipe: str, *, rehearsal: bool) -> None:
        """Show nothing: the first lines of the job say it."""

    def step(self, step: Step) -> None:
        """Advance the bar; without a terminal, print a line for each tenth of the way."""
        if not ERR.is_terminal:
            if step.step % max(1, step.steps // 10) == 0 or step.step == 1:
                say(f"step {step.step}/{step.steps}  loss {step.loss:.3f}  {step.tokens_per_second:.0f} tok/s  "
                    f"{_clock(step.eta_seconds)} left")  # fmt: skip
            return
        fields: dict[str, Any] = {"loss": step.loss, "speed": step.tokens_per_second, "left": _clock(step.eta_seconds)}
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("training", total=step.steps, **fields)
        self._progress.update(self._task, completed=step.step, **fields)

    def proof(self, card: dict[str, Any]) -> None:
        """Show the proof card."""
        show_proof(card)

    def outcome(self, planned: dict[str, Any]) -> None:
        """Show what was planned beside what was measured."""
        show_outcome(planned)


def show_outcome(planned: dict[str, Any]) -> None:
    """Print what a tuning was planned to take beside what it took."""
    rows = []
    for name, key, unit in (("peak memory of a process, GB", "memory_bytes", 1e9), ("training, minutes", "seconds", 60)):
        expected, measured = planned[key]["planned"] / unit, planned[key]["measured"] / unit
        rows.append((name, f"{expected:.2f}", f"{measured:.2f}", f"{measured / expected:.2f}"))
    table("Planned and measured", ["what", "planned", "measured", "ratio"], rows)


def show_proof(card: dict[str, Any]) -> None:
    """Print a proof card: what tuning changed, what it cost elsewhere, who can serve it."""
    losses = {k: v for k, v in card.items() if k.endswith("_loss")}
    rows = [(name.replace("_", " "), f"{v['before']:.3f}", f"{v['after']:.3f}") for name, v in losses.items()]
    rows += [
        ("largest change of a logit", "", f"{card['logit_change']:.2f}"),
        ("replies that stop", "", f"{card['stop_rate']:.0%}"),
    ]
    rows += [(f"served by {engine}", "", answer) for engine, answer in card["servable"].items()]
    table("Proof card (losses in nats per token)", ["what", "before", "after"], rows)


class CountScreen:
    """A progress bar for countable work in named stages; without a terminal, a line for each stage."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=ERR
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> CountScreen:
        """Start the bars if there is a terminal."""
        if ERR.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last state of the bars on the screen."""
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage is finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
            if not ERR.is_terminal:
                say(f"{stage}: {total}")
        self._progress.update(self._tasks[stage], completed=done, total=total)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
