"""Chunks of a document: pieces of its sections that the embedder reads whole.

A section is cut at paragraphs first, then at list items and rows, sentences, lines and words, and the pieces
are packed up to the limit. The embedder's own tokenizer counts the tokens, with the title that is embedded
in front of it, so nothing is ever cut off. Chunks do not overlap.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.rag.load import Document, Section

# A word that the tokenizer does not know counts as one token however long it is; a prompt could not hold it.
MAX_CHARACTERS_PER_TOKEN = 16

_BREAKS = tuple(re.compile(pattern) for pattern in (
    r"\n\s*\n",                              # paragraph
    r"\n(?=[ \t]*(?:[-*+]\s|\d+[.)]\s|\|))",  # list item, table row
    r"(?<=[.!?])\s+",                        # sentence
    r"\n",                                   # line
    r"\s+",                                  # word
))  # fmt: skip

Span = tuple[int, int]
Fits = Callable[[Span], bool]


@dataclass(frozen=True)
class Chunk:
    """A piece of a section.

    Attributes:
        id: 16 hexadecimal digits made of source, title and text, so unchanged text keeps its id.
        source: path of the document, relative to its folder.
        title: heading path, such as "Claude 2 > Origin and licence".
        text: the piece itself.
        start: offset of its first character in the section.
        end: offset after its last character in the section.
        page: page number in a PDF or an image of several pages, starting at 1.
        kind: of file, such as "markdown" (pipelines.rag.load); the id does not depend on it.
    """

    id: str
    source: str
    title: str
    text: str
    start: int
    end: int
    page: int | None = None
    kind: str = "text"

    @property
    def passage(self) -> str:
        """Return what is embedded and hashed: the title and the text."""
        return passage(self.title, self.text)

    @property
    def content_hash(self) -> str:
        """Return the sha256 of the passage, by which its vector is found again."""
        return hashlib.sha256(self.passage.encode()).hexdigest()


def passage(title: str, text: str) -> str:
    """Return the form in which a text is embedded: its title in front."""
    return f"{title}: {text}"


def chunk(document: Document, max_tokens: int, token_count: Callable[[str], int]) -> list[Chunk]:
    """Cut a document into chunks in reading order.

    Args:
        document: the document.
        max_tokens: limit for title and text together, as `token_count` counts.
        token_count: the embedder's count for one text, with the special tokens it adds.
    """
    chunks, seen = [], Counter[tuple[str, str]]()
    for section in document.sections:
        title, text = _titled(section, max_tokens, token_count)
        for start, end in _spans(title, text, max_tokens, token_count):
            piece = text[start:end]
            chunk_id = _id(document.source, title, piece, seen[title, piece])
            seen[title, piece] += 1
            chunks.append(Chunk(chunk_id, document.source, title, piece, start, end, section.page, document.kind))
    return chunks


def _titled(section: Section, max_tokens: int, token_count: Callable[[str], int]) -> tuple[str, str]:
    """Return title and text; a title that fills half of a chunk is shortened and goes whole into the text."""
    whole = title = " > ".join(section.path)
    while token_count(title) > max_tokens // 2 or len(title) > max_tokens * MAX_CHARACTERS_PER_TOKEN // 2:
        title = title[: len(title) * 3 // 4].rstrip() + "…"
    return title, section.text if title == whole else f"{whole}\n\n{section.text}"


def _spans(title: str, text: str, max_tokens: int, token_count: Callable[[str], int]) -> Iterator[Span]:
    def fits(span: Span) -> bool:
        content = passage(title, text[slice(*span)])
        return len(content) <= max_tokens * MAX_CHARACTERS_PER_TOKEN and token_count(content) <= max_tokens

    return _pack(_atoms(text, (0, len(text)), fits, _BREAKS), fits)


def _atoms(text: str, span: Span, fits: Fits, breaks: tuple[re.Pattern[str], ...]) -> Iterator[Span]:
    """Yield the largest structural pieces that fit; a word that does not fit is halved until it does."""
    start, end = span
    if end - start <= 1 or fits(span):
        yield span
        return
    middle = (start + end) // 2
    pieces = _pieces(text, span, breaks[0]) if breaks else [(start, middle), (middle, end)]
    for piece in pieces:
        yield from _atoms(text, piece, fits, breaks[1:])


def _pieces(text: str, span: Span, pattern: re.Pattern[str]) -> Iterator[Span]:
    start, end = span
    for match in pattern.finditer(text, start, end):
        if match.start() > start:
            yield start, match.start()
        start = match.end()
    if start < end:
        yield start, end


def _pack(atoms: Iterable[Span], fits: Fits) -> Iterator[Span]:
    current: Span | None = None
    for atom in atoms:
        if current and fits((current[0], atom[1])):
            current = current[0], atom[1]
        else:
            if current:
                yield current
            current = atom
    if current:
        yield current


def _id(source: str, title: str, text: str, occurrence: int) -> str:
    return hashlib.sha256("\0".join((source, title, text, str(occurrence))).encode()).hexdigest()[:16]
