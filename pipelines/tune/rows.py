"""What a trainer is fed: rows of chat turns, from the generated instruction set or a user's file, or of plain text."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        messages: chat turns (`role`, `content`) that end with the assistant's; every assistant turn is learnt.
        rejected: of a preference, the reply that is worse than the last turn; None otherwise.
        origin: where the row stands, such as "faq.jsonl:12", for messages about it; of a text "guide.pdf#3", its third piece.
        group: rows of one group are held out together; empty where the row's beginning tells which those are.
        text: plain text in place of turns; every token is learnt.
        ends: whether the text is the end of its document, which is learnt too.
    """

    messages: tuple[Message, ...]
    rejected: str | None = None
    origin: str = ""
    group: str = ""
    text: str | None = None
    ends: bool = True

    @property
    def prompt(self) -> list[Message]:
        """Return the turns before the last reply."""
        return list(self.messages[:-1])

    @property
    def reply(self) -> str:
        """Return the last reply."""
        return self.messages[-1]["content"]
