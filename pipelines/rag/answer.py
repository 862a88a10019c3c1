"""The reader's contract: how a question and its passages become a prompt, and how the reply becomes an answer.

Training data, evaluation and the gateway all use this one format, so the model is asked in service as it was taught.
Passages come before the question, so that the engine can reuse the prefix of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.rag.screen import without_marks

SYSTEM = "Answer briefly from the numbered passages and cite the number. If they do not hold the answer, say so."
CLOSED_BOOK_SYSTEM = "Answer the question briefly."
ABSTENTION = "The passages do not answer this question."

_CITATION = re.compile(r"\s*\[(\d+)\]")


class Passage(Protocol):
    """What a prompt needs of a retrieved chunk."""

    @property
    def title(self) -> str:
        """Where the text stands, such as "Claude 2 > Origin and licence"."""

    @property
    def text(self) -> str:
        """The text of the chunk."""


@dataclass(frozen=True)
class Reply:
    """A generated text, taken apart.

    Attributes:
        text: the answer without its citation marks.
        cited: passage numbers in order of appearance, starting at 1, each once; only those that exist.
        invalid: cited numbers that no passage has.
        abstained: True if the model said that the passages hold no answer.
    """

    text: str
    cited: tuple[int, ...]
    invalid: tuple[int, ...]
    abstained: bool


def messages(question: str, passages: Sequence[Passage]) -> list[dict[str, str]]:
    """Return the chat messages for a question and its passages, numbered from 1 in the order given."""
    numbered = [f"[{number}] {_one_line(p.title)}: {_one_line(p.text)}" for number, p in enumerate(passages, 1)]
    content = "\n".join([*numbered, "", f"Question: {_one_line(question)}"])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def closed_book_messages(question: str) -> list[dict[str, str]]:
    """Return the chat messages for a question without passages."""
    return [{"role": "system", "content": CLOSED_BOOK_SYSTEM}, {"role": "user", "content": f"Question: {_one_line(question)}"}]


def reply_text(answer: str, citation: int | None) -> str:
    """Return what the model should write: the answer and its citation, or the abstention sentence for None."""
    return ABSTENTION if citation is None else f"{answer} [{citation}]"


def parse(text: str, passage_count: int) -> Reply:
    """Take a generated text apart; see `Reply`."""
    numbers = list(dict.fromkeys(int(number) for number in _CITATION.findall(text)))
    plain = _CITATION.sub("", text).strip()
    return Reply(
        text=plain,
        cited=tuple(n for n in numbers if 1 <= n <= passage_count),
        invalid=tuple(n for n in numbers if not 1 <= n <= passage_count),
        abstained=plain.lower().startswith(ABSTENTION.lower().rstrip(".")),
    )


def _one_line(text: str) -> str:
    return " ".join(without_marks(text).split())
