"""What a guard is: a screen looks at a whole text, a window at a reply while it is written.

A window lets text out as soon as nothing that follows could change what it says about it; so a streamed reply and the same reply
in one piece come out alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from monitoring.metrics import GUARD_DECISIONS

Action = Literal["report", "redact", "block"]
Stage = Literal["input", "chunk", "output"]


class Screen(Protocol):
    """Looks at a whole text."""

    @property
    def name(self) -> str:
        """Return the guard's name in the configuration."""
        ...

    def find(self, text: str) -> Sequence[str]:
        """Return the kind of each thing that is found."""
        ...

    def redacted(self, text: str) -> str:
        """Return the text without what `find` finds."""
        ...


class Window(Protocol):
    """Looks at one reply, piece by piece."""

    @property
    def name(self) -> str:
        """Return the guard's name in the configuration."""
        ...

    @property
    def action(self) -> Action:
        """Return what is done about what is found."""
        ...

    @property
    def found(self) -> list[str]:
        """Return the kind of each thing that was found so far."""
        ...

    @property
    def held(self) -> bool:
        """Return True if text was fed that may still change and has not come out."""
        ...

    @property
    def stopped(self) -> bool:
        """Return True if nothing more may come out."""
        ...

    @property
    def finish_reason(self) -> str:
        """Return the finish reason of a reply that is stopped here."""
        ...

    def feed(self, piece: str) -> str:
        """Take the next piece and return the text that may go out now."""
        ...

    def end(self) -> str:
        """Return the rest, when the reply is at its end."""
        ...


@dataclass
class Told:
    """What the guards did to one request, as its answer tells it.

    Attributes:
        redacted: how often something of a kind was replaced, in question, passages and answer.
        blocked: the guard that stopped the answer, or None.
    """

    redacted: Counter[str] = field(default_factory=Counter)
    blocked: str | None = None

    def decide(self, guard: str, stage: Stage, action: Action, kinds: Sequence[str]) -> None:
        """Count what a guard found and what is done about it."""
        if not kinds:
            return
        GUARD_DECISIONS.labels(guard=guard, stage=stage, action=action).inc(len(kinds))
        if action == "redact":
            self.redacted.update(kinds)
        elif action == "block" and stage == "output":
            self.blocked = guard

    def shown(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"redacted": dict(self.redacted), "blocked": self.blocked}
