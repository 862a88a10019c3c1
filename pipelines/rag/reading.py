"""An answer that is read while it is written: its citations and sentences, each as soon as it is complete.

Tokens may split a mark ("[", "1", "]") or a sentence anywhere. At the end exactly the citations of `pipelines.rag.answer.parse`
and the sentences of `pipelines.rag.support.sentences` have been given, in their order.
"""

from __future__ import annotations

from pipelines.rag.answer import parse
from pipelines.rag.support import sentences


class Reading:
    """The state of one answer.

    Args:
        passage_count: of the passages that the model was given.

    Attributes:
        text: what was read.
    """

    def __init__(self, passage_count: int) -> None:
        self.text, self._count = "", passage_count
        self._cited: set[int] = set()
        self._rest = ""

    def feed(self, piece: str) -> tuple[list[int], list[str]]:
        """Take a piece; return the numbers first cited by it and the sentences that are complete with it.

        A sentence is complete when the next one has begun: a full stop alone may be followed by a citation mark.
        """
        self.text += piece
        self._rest += piece
        numbers = self._new_numbers() if "]" in piece else []
        complete = sentences(self._rest)[:-1]
        for sentence in complete:
            self._rest = self._rest[self._rest.index(sentence) + len(sentence) :]
        return numbers, self._unless_abstained(complete)

    def end(self) -> list[str]:
        """Return the sentences that were not complete before the end."""
        left, self._rest = sentences(self._rest), ""
        return self._unless_abstained(left)

    def _new_numbers(self) -> list[int]:
        reply = parse(self.text, self._count)
        new = [n for n in (*reply.cited, *reply.invalid) if n not in self._cited]
        self._cited.update(new)
        return new

    def _unless_abstained(self, complete: list[str]) -> list[str]:
        return [] if complete and parse(self.text, self._count).abstained else complete
