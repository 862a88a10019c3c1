"""What every reader makes of a file: sections below headings; and what it says of a file that it leaves out.

Nothing is opened or parsed here. Used by: pipelines.rag.load and its readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """The text below one heading.

    Attributes:
        path: headings, the outermost first; begins with the document's title if none of them has level 1.
        text: the text, without the heading.
        page: page number in a PDF or an image of several pages, starting at 1.
    """

    path: tuple[str, ...]
    text: str
    page: int | None = None


@dataclass(frozen=True)
class Part:
    """A heading of level 1 or more (0 for what comes before the first) and the text up to the next one."""

    level: int
    heading: str
    text: str


class Unreadable(Exception):
    """The reason why a file is left out; with the sha256 of the file if nothing else could make it readable."""

    def __init__(self, reason: str, sha256: str = "") -> None:
        super().__init__(reason)
        self.sha256 = sha256


Read = tuple[str, list[Section]]  # title and sections
Reader = Callable[[bytes, str], Read]  # content and file stem -> what it says


def below_headings(title: str, parts: Sequence[Part]) -> Read:
    """Return the document's title (its first level-1 heading, or `title`) and its sections."""
    title = next((part.heading for part in parts if part.level == 1 and part.heading), title)
    sections, above = [], list[Part]()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        above = [p for p in above if p.level < part.level] + [part]
        path = [p.heading for p in above if p.heading]
        if not any(p.level == 1 and p.heading for p in above):
            path.insert(0, title)
        # a heading without text counts as text, unless headings below it carry it in their paths
        last = following is None or following.level <= part.level
        sections.append(Section(tuple(path), part.text.strip() or (part.heading if last else "")))
    return title, sections


def text_of(content: bytes) -> str:
    """Return UTF-8 as text with plain line ends; `Unreadable` if it is something else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (byte {error.start})") from None
    if "\x00" in text:
        raise Unreadable("not a text file (it holds NUL bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


def storable(text: str) -> str:
    """Return a text that can be stored as UTF-8: broken PDF fonts and JSON escapes yield lone surrogates and NULs."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def check_size(content: bytes, limit: int) -> None:
    """Raise `Unreadable` if a file has more bytes than its reader takes."""
    if len(content) > limit:
        raise Unreadable(f"{len(content)} bytes, more than the {limit} that are read of such a file")
