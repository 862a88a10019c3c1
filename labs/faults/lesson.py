"""One lesson: break a sandbox, let the learner look, give hints, and grade the diagnosis.

The process that keeps the sandbox writes a small file, which other terminals read for hints and grades. The fault stands in it as
a salted hash only, so that a look at the file spoils nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from labs.faults.sandbox import Sandbox
from labs.faults.table import FAULTS, Fault, find
from monitoring.dashboards.boards import BOARDS
from monitoring.queries import NoAnswer
from pipelines.config import ROOT, Config, unknown
from pipelines.errors import ConfigError, EngineError
from serving.launch import stopped_by_signals

HIDDEN = "random"
STATE = ROOT / ".cache" / "break" / "lab.json"
HEALTHY_SECONDS = 20.0  # of traffic before the fault, so that panels show the change

Say = Callable[[str], None]


class State(Config):
    """What other terminals know of the sandbox that runs.

    Attributes:
        pid: of the process that keeps it.
        salt: of the hash.
        answer: hash of salt and name.
        hints: how many were given.
    """

    pid: int
    salt: str
    answer: str
    hints: int
    prometheus: str
    gateway: str


class Grade(NamedTuple):
    """What is said about a diagnosis."""

    right: bool
    lines: tuple[str, ...]


def run(name: str, say: Say) -> None:
    """Break a sandbox and keep it until Ctrl-C; "random" takes a fault that is not told.

    Raises:
        ConfigError: another sandbox runs already.
        UnknownName: there is no such fault.
        EngineError: something does not start.
    """
    fault = secrets.choice(FAULTS) if name == HIDDEN else find(name)
    _check_alone()
    try:
        with stopped_by_signals():
            say("starting a stack of its own: index, Prometheus, engine, gateway, users (half a minute)")
            with Sandbox(say if name != HIDDEN else lambda _: None) as sandbox:
                say(f"healthy; users come to {sandbox.url}. In {HEALTHY_SECONDS:g} s something breaks")
                time.sleep(HEALTHY_SECONDS)
                with fault.plant(sandbox):
                    _keep(fault, sandbox)
                    for line in _instructions(sandbox, None if name == HIDDEN else fault):
                        say(line)
                    while True:
                        time.sleep(3600)
    except KeyboardInterrupt:
        say("stopped; nothing of it is left")
    finally:
        _forget()


def hint() -> str:
    """Return the next hint to the fault of the sandbox that runs; after the last one, that one again."""
    state = _state()
    fault = _planted(state)
    number = min(state.hints, len(fault.hints) - 1)
    _write(state.model_copy(update={"hints": state.hints + 1}))
    return f"hint {number + 1} of {len(fault.hints)}: {fault.hints[number]}"


def check(diagnosis: str, seen_on: str | None) -> Grade:
    """Grade a diagnosis of the sandbox that runs.

    Args:
        diagnosis: name of a fault.
        seen_on: title of a panel or name of an alert that shows it; None grades the diagnosis alone.

    Raises:
        UnknownName: there is no such fault, panel or alert.
        ConfigError: no sandbox runs.
    """
    guess, state = find(diagnosis), _state()
    fault = _planted(state)
    places = {fault.sign.panel, *filter(None, [fault.sign.alert])}
    if seen_on is not None:
        _check_place(seen_on)
    if guess is not fault:
        return Grade(False, (f"{diagnosis} it is not; llmlab break --hint helps", *_evidence(guess, state, "it would show on")))
    lines = (f"right: {fault.what}", *_evidence(fault, state, "it shows on"), f"outside of the lab: {fault.remedy}",
             f"{state.hints} hints were taken")  # fmt: skip
    if seen_on is not None and seen_on not in places:
        return Grade(False, (f"{diagnosis} it is, and {seen_on!r} is not where it shows most plainly; look again",))
    return Grade(True, lines)


def _evidence(fault: Fault, state: State, words: str) -> tuple[str, ...]:
    """Return what the panel of a fault shows now."""
    sign = fault.sign
    try:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in sorted(sign.shown(state.prometheus).items())) or "no data"
    except NoAnswer as problem:
        raise EngineError(str(problem), "the sandbox's Prometheus", "llmlab break") from None
    return (f"{words} {sign.panel!r} of the board {sign.board} as: {sign.says}. Now it shows: {shown}",)


def _instructions(sandbox: Sandbox, fault: Fault | None) -> list[str]:
    url = sandbox.prometheus_url
    what = f"planted {fault.name}: {fault.what}" if fault else "something is broken now. What is it?"
    return [
        what,
        f"boards   llmlab dashboards render overview --prometheus {url} --since 5m -o overview.html (also serving, rag)",
        f"alerts   {url}/alerts    metrics {url}/graph",
        f"logs     {sandbox.log} and {sandbox.engine_log}",
        f"gateway  {sandbox.url}/docs",
        "then, in another terminal: llmlab break --hint, llmlab break --check DIAGNOSIS --panel 'TITLE'; Ctrl-C ends everything",
    ]


def _check_place(name: str) -> None:
    """Raise `UnknownName` unless there is such a panel or alert."""
    panels = {plot.title for board in BOARDS for plot in board.plots}
    alerts = {path.stem for path in (ROOT / "monitoring" / "runbooks").glob("*.md")}
    if name not in panels | alerts:
        raise unknown("panel or alert", name[:80], sorted(panels | alerts))


def _keep(fault: Fault, sandbox: Sandbox) -> None:
    salt = secrets.token_hex(16)
    _write(State(pid=os.getpid(), salt=salt, answer=_hash(salt, fault.name), hints=0, prometheus=sandbox.prometheus_url,
                 gateway=sandbox.url))  # fmt: skip


def _write(state: State) -> None:
    STATE.parent.mkdir(parents=True, exist_ok=True)
    STATE.write_text(state.model_dump_json(), encoding="utf-8")


def _forget() -> None:
    state = _read()
    if state and state.pid == os.getpid():
        STATE.unlink()


def _read() -> State | None:
    """Return the state of the sandbox that runs, None if there is none."""
    import psutil

    try:
        state = State.model_validate_json(Path(STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if psutil.pid_exists(state.pid) else None


def _state() -> State:
    state = _read()
    if state is None:
        raise ConfigError("nothing is broken now", "a sandbox that runs in another terminal", f"llmlab break {HIDDEN}")
    return state


def _check_alone() -> None:
    state = _read()
    if state:
        raise ConfigError(f"process {state.pid} keeps a broken stack already", "one at a time", "Ctrl-C in its terminal")


def _planted(state: State) -> Fault:
    return next(fault for fault in FAULTS if _hash(state.salt, fault.name) == state.answer)


def _hash(salt: str, name: str) -> str:
    return hashlib.sha256(json.dumps([salt, name]).encode()).hexdigest()
