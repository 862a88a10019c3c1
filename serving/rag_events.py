"""What a streamed answer tells beside its tokens: citations and sentences, each when it is complete.

    passages, then for each piece of text: token, citation..., sentence...; after the last: sentence..., answer

`citation` comes once for each number, with `valid: false` for one that no passage has; `sentence` is as in the answer. An
abstention has no sentences. `error` may come in place of all that is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.rag.reading import Reading
from serving.knowledge import Knowledge

if TYPE_CHECKING:
    from pipelines.rag.retrieve import Retrieved

Step = tuple[str, dict[str, Any]]
CITED_FIELDS = ("chunk_id", "source", "title", "page")


class AnswerReader:
    """Reads an answer and checks its sentences while it is written.

    Args:
        knowledge: checks sentences.
        found: the passages that the model was given.

    Attributes:
        sentences: that were complete so far, as the answer shows them.
    """

    def __init__(self, knowledge: Knowledge, found: Retrieved) -> None:
        self.sentences: list[dict[str, Any]] = []
        self._knowledge, self._found = knowledge, found
        self._reading = Reading(len(found.hits))

    @property
    def text(self) -> str:
        """Return what was read."""
        return self._reading.text

    async def feed(self, piece: str) -> list[Step]:
        """Return the events of a piece of text."""
        numbers, complete = self._reading.feed(piece)
        return [("token", {"text": piece}), *(("citation", self._citation(n)) for n in numbers), *await self._checked(complete)]

    async def end(self) -> list[Step]:
        """Return the events of the end of the text."""
        return await self._checked(self._reading.end())

    def _citation(self, number: int) -> dict[str, Any]:
        valid = 1 <= number <= len(self._found.hits)
        hit = self._found.hits[number - 1] if valid else None
        return {"number": number, "valid": valid, **{field: getattr(hit, field, None) for field in CITED_FIELDS}}

    async def _checked(self, complete: list[str]) -> list[Step]:
        checked = [one for sentence in complete for one in await self._knowledge.check(sentence, self._found)]
        self.sentences += checked
        return [("sentence", sentence) for sentence in checked]
