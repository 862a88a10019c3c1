"""Whether what an answer says stands in the passages that it cites, sentence by sentence.

Signs: every number of the sentence is in the passage, and most of its words are, by their stems and without the commonest;
where only some of the words are, the vectors of sentence and passage must be near each other too. This finds what is made up
or mixed up from elsewhere; a sentence that turns the passage's words into their opposite passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.rag.index import Hit
    from pipelines.rag.retrieve import Retriever

MOST, SOME = 0.6, 0.4  # shares of the words of a sentence
NEAR = 0.45  # cosine of sentence and passage where only some of the words are found; set with MiniLM's vectors

_MARK = re.compile(r"\s*\[(\d+)\]")
_END = re.compile(r"[.!?](?:\s*\[\d+\])*(?=\s+[A-Z0-9\"'(]|\s*$)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer.

    Attributes:
        text: without its citation marks.
        cited: numbers of the passages it cites, from 1, that exist.
        supported: whether one of them holds it, or any passage if it cites none; None if it has nothing that can be checked.
    """

    text: str
    cited: tuple[int, ...]
    supported: bool | None


def check(answer: str, hits: Sequence[Hit], retriever: Retriever) -> tuple[Sentence, ...]:
    """Return the sentences of an answer as the model wrote it, citation marks included.

    Args:
        answer: the generated text.
        hits: the passages that the model was given, in the order of their numbers.
        retriever: of the index that they are from.
    """
    return tuple(_checked(text, hits, retriever) for text in sentences(answer))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with the citation marks that stand in it or behind it."""
    found, start = [], 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        if part := text[start:end].strip():
            found.append(part)
        start = end
    return found


def _checked(sentence: str, hits: Sequence[Hit], retriever: Retriever) -> Sentence:
    cited = tuple(dict.fromkeys(n for n in map(int, _MARK.findall(sentence)) if 1 <= n <= len(hits)))
    plain = _MARK.sub("", sentence).strip()
    words, numbers = _words(plain, retriever.config.stemmer), _numbers(plain)
    if not words and not numbers:
        return Sentence(plain, cited, None)
    among = [hits[n - 1] for n in cited] or list(hits)
    return Sentence(plain, cited, any(_holds(hit, plain, words, numbers, retriever) for hit in among))


def _holds(hit: Hit, plain: str, words: set[str], numbers: set[str], retriever: Retriever) -> bool:
    passage = f"{hit.title} {hit.text}"
    if not numbers <= _numbers(passage):
        return False
    share = len(words & _words(passage, retriever.config.stemmer)) / len(words) if words else 1.0
    if share >= MOST or share < SOME:
        return share >= MOST
    embedder = retriever.embedder
    if embedder.token_count(plain) > embedder.max_tokens:
        return False
    return float(embedder.embed([plain])[0] @ retriever.index.vectors.rows[hit.row]) >= NEAR


def _words(text: str, stemmer: str) -> set[str]:
    """Return the stems of the words of a text, without the commonest words and without numbers."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    from pipelines.rag.lexical import words_of

    common = (*STOPWORDS_EN_PLUS, "yes", "one")
    kept = " ".join(w for w in re.findall(r"\w+", text.lower()) if w not in common and not w[0].isdigit())
    return set(words_of([kept], stemmer)[0]) if kept else set()


def _numbers(text: str) -> set[str]:
    """Return the numbers of a text, without what separates thousands."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}
