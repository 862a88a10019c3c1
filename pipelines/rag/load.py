"""Documents from a folder: Markdown, plain text, HTML and PDF, each as sections below its headings.

A file that cannot be read is reported and the others go on; links out of the folder are not followed. No
chunking, embedding or watching for changes here. Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import DataError

if TYPE_CHECKING:
    from markdown_it.token import Token

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*['\"]?(.+?)['\"]?[ \t]*$", re.MULTILINE)
_HTML_DROPPED = ("title", "script", "style", "template", "noscript", "nav")
_HTML_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_HTML_BLOCKS = (
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "header", "hr", "li", "main", "ol", "p", "pre", "section", "table", "tr", "ul",
)  # fmt: skip
READERS_VERSION = 1  # raise it when a reader reads something else from the same file
_HTML_MARK = "\x00"  # stands around a heading; no text file that is read here holds one


@dataclass(frozen=True)
class Section:
    """The text below one heading.

    Attributes:
        path: headings, the outermost first; begins with the document's title if none of them has level 1.
        text: the text, without the heading.
        page: page number in a PDF, starting at 1.
    """

    path: tuple[str, ...]
    text: str
    page: int | None = None


@dataclass(frozen=True)
class Document:
    """A readable file.

    Attributes:
        source: its path relative to the folder, with forward slashes.
        sections: what it says; none only if it is a file that `load` was told to know.
        sha256: of the file.
    """

    source: str
    title: str
    sections: tuple[Section, ...]
    sha256: str = ""


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class _Part:
    """A heading of level 1 to 6 (0 for what comes before the first) and the text up to the next one."""

    level: int
    heading: str
    text: str


# content and file stem -> title and sections
_Reader = Callable[[bytes, str], tuple[str, list[Section]]]


class _Unreadable(Exception):
    """The reason why a file is left out."""


def load(root: Path, known: Mapping[str, str] | None = None) -> tuple[list[Document], list[Skipped]]:
    """Read every document below a folder, in the order of the paths; hidden files are passed over.

    Args:
        root: the folder.
        known: sha256 by source; a file that still has it is not parsed, and comes without sections.

    Raises:
        DataError: there is no such folder, or no readable document in it.
    """
    if not root.is_dir():
        came = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"{root} {came}", "a folder of documents", "make index DOCS=path/to/folder")
    documents, skipped = [], []
    for path in _files(root):
        source = path.relative_to(root).as_posix()
        try:
            documents.append(_read(root, path, source, (known or {}).get(source)))
        except _Unreadable as error:
            skipped.append(Skipped(_valid(source), str(error)))
    if not documents:
        raise _empty(root, skipped)
    return documents, skipped


def document_files(root: Path) -> list[Path]:
    """Return the files below a folder that `load` tries to read, in its order."""
    inside = os.path.realpath(root)
    return [path for path in _files(root) if path.suffix.lower() in _READERS and path.is_file()
            and Path(os.path.realpath(path)).is_relative_to(inside)]  # fmt: skip


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and (path.is_file() or path.is_symlink()):
            yield path


def _empty(root: Path, skipped: Sequence[Skipped]) -> DataError:
    reasons = "".join(f"\n  {s.path}: {s.reason}" for s in skipped[:10])
    more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    return DataError(f"{root} holds no readable document ({len(skipped)} skipped){reasons}{more}",
                     f"at least one non-empty file of type {', '.join(sorted(_READERS))}",
                     "make index DOCS=path/to/folder")  # fmt: skip


def _read(root: Path, path: Path, source: str, known: str | None) -> Document:
    if source != _valid(source):
        raise _Unreadable("the file name is not UTF-8")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise _Unreadable("a link that leads out of the folder")
    if not path.is_file():
        raise _Unreadable("a link to a folder or to nothing")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise _Unreadable(f"files of type {path.suffix or '(none)'} are not supported")
    content = _content(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == known:
        return Document(source, "", (), sha256)
    title, sections = _parse(reader, content, path.stem)
    if not any(section.text for section in sections):
        raise _Unreadable("no text in it (if it is a scan, it needs OCR first)")
    return Document(source, title, tuple(section for section in sections if section.text), sha256)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Unreadable(f"cannot be read: {type(error).__name__}: {error}") from error
    if not content:
        raise _Unreadable("0 bytes")
    return content


def _parse(reader: _Reader, content: bytes, stem: str) -> tuple[str, list[Section]]:
    try:
        return reader(content, stem)
    except _Unreadable:
        raise
    except Exception as error:  # whatever a parser raises on a broken file, the other files are still wanted
        raise _Unreadable(f"cannot be read: {type(error).__name__}: {error}") from error


def _text(content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8 (byte {error.start})") from None
    if "\x00" in text:
        raise _Unreadable("not a text file (it holds NUL bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(content: bytes, stem: str) -> tuple[str, list[Section]]:
    return stem, [Section((stem,), _text(content).strip())]


def _markdown(content: bytes, stem: str) -> tuple[str, list[Section]]:
    from markdown_it import MarkdownIt

    text = _text(content)
    title, front = stem, _FRONT_MATTER.match(text)
    if front:
        text = text[front.end() :]
        named = _FRONT_TITLE.search(front[1])
        title = named[1] if named else stem
    return _sections(title, _markdown_parts(text.split("\n"), MarkdownIt("commonmark").parse(text)))


def _markdown_parts(lines: list[str], tokens: Sequence[Token]) -> list[_Part]:
    # (level, heading, first line, line after it); a heading inside a list or a quotation stays text
    found: list[tuple[int, str, int, int]] = [(0, "", 0, 0)]
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open" and opening.level == 0 and opening.map:
            first, after = opening.map
            found.append((int(opening.tag[1]), _heading_text(inline), first, after))
    ends = [first for _, _, first, _ in found[1:]] + [len(lines)]
    return [_Part(level, _one_line(heading), "\n".join(lines[after:end]))
            for (level, heading, _, after), end in zip(found, ends, strict=True)]  # fmt: skip


def _heading_text(inline: Token) -> str:
    children = [child for child in inline.children or [] if child.type != "html_inline"]
    return "".join(" " if child.type.endswith("break") else child.content for child in children)


def _html(content: bytes, stem: str) -> tuple[str, list[Section]]:
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(_text(content), "html.parser")
    title = _one_line(soup.title.get_text()) if soup.title else ""
    for tag in soup.find_all(_HTML_DROPPED):
        tag.decompose()
    for tag in soup.find_all(_HTML_HEADINGS):
        tag.replace_with(f"{_HTML_MARK}{tag.name[1]}{_one_line(tag.get_text())}{_HTML_MARK}")
    for tag in soup.find_all(_HTML_BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    for tag in soup.find_all(["br", "td", "th"]):
        tag.insert_after("\n" if tag.name == "br" else " ")
    before, *rest = soup.get_text().split(_HTML_MARK)
    parts = [_Part(int(mark[0]), mark[1:], text) for mark, text in zip(rest[::2], rest[1::2], strict=True)]
    return _sections(title or stem, [_Part(0, "", before), *parts])


def _pdf(content: bytes, stem: str) -> tuple[str, list[Section]]:
    import io

    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise _Unreadable("protected by a password")
    title = _one_line(_valid(reader.metadata.title or "")) if reader.metadata else ""
    pages = [_valid(page.extract_text()).strip() for page in reader.pages]
    return title or stem, [Section((title or stem,), text, page) for page, text in enumerate(pages, 1)]


def _sections(title: str, parts: list[_Part]) -> tuple[str, list[Section]]:
    """Return the document's title (its first level-1 heading, or `title`) and its sections."""
    title = next((part.heading for part in parts if part.level == 1 and part.heading), title)
    sections, above = [], list[_Part]()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        above = [p for p in above if p.level < part.level] + [part]
        path = [p.heading for p in above if p.heading]
        if not any(p.level == 1 and p.heading for p in above):
            path.insert(0, title)
        # a heading without text counts as text, unless headings below it carry it in their paths
        last = following is None or following.level <= part.level
        sections.append(Section(tuple(path), part.text.strip() or (part.heading if last else "")))
    return title, sections


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _valid(text: str) -> str:
    """Replace what cannot be stored as UTF-8: broken PDF fonts yield lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


_READERS: dict[str, _Reader] = {
    ".md": _markdown, ".markdown": _markdown, ".txt": _plain, ".html": _html, ".htm": _html, ".pdf": _pdf,
}  # fmt: skip
