"""What a trainer is fed: rows of chat turns, from the generated instruction set or from a user's file."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        messages: chat turns (`role`, `content`) that end with the assistant's; every assistant turn is learnt.
        rejected: of a preference, the reply that is worse than the last turn; None otherwise.
        origin: where the row stands, such as "faq.jsonl:12", for messages about it.
    """

    messages: tuple[Message, ...]
    rejected: str | None = None
    origin: str = ""

    @property
    def prompt(self) -> list[Message]:
        """Return the turns before the last reply."""
        return list(self.messages[:-1])

    @property
    def reply(self) -> str:
        """Return the last reply."""
        return self.messages[-1]["content"]
