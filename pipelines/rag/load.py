"""Documents from a folder, each as sections below its headings; the file name says which reader takes a file.

    markdown, text, html    Markdown, plain text, web pages
    docx, pdf, image        Word, PDF, pictures of text (OCR)
    table, records          CSV and TSV, JSON and JSONL
    code                    source code, YAML, TOML

A file that cannot be read is reported and the others go on; links out of the folder are not followed. No
chunking, embedding or watching for changes here. Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.errors import DataError
from pipelines.rag.readers import code, image, markup, office, tabular
from pipelines.rag.readers.section import Read, Reader, Section, Unreadable, storable

__all__ = ["KINDS", "READERS_VERSION", "Document", "File", "Section", "Skipped", "document_files", "files_below", "load",
           "nothing_in", "read"]  # fmt: skip

READERS_VERSION = 3  # raise it when a reader reads something else from the same file
MAX_BYTES = 200_000_000  # of any file, before it is read

# kind -> reader and the file names it takes
_KINDS: dict[str, list[tuple[Reader, tuple[str, ...]]]] = {
    "markdown": [(markup.markdown, (".md", ".markdown"))],
    "text": [(markup.plain, (".txt",))],
    "html": [(markup.html, (".html", ".htm"))],
    "pdf": [(office.pdf, (".pdf",))],
    "docx": [(office.docx, (".docx",))],
    "table": [(tabular.comma_separated, (".csv",)), (tabular.tab_separated, (".tsv",))],
    "records": [(tabular.records, (".json",)), (tabular.record_lines, (".jsonl",))],
    "code": [(code.python, (".py",)),
             (code.other_code, (".js", ".ts", ".go", ".rs", ".java", ".c", ".h", ".cpp", ".rb", ".sh", ".sql", ".yaml", ".yml",
                                ".toml"))],
    "image": [(image.picture, (".png", ".jpg", ".jpeg", ".webp", ".tiff", ".tif"))],
}  # fmt: skip
_READERS = {suffix: (kind, reader) for kind, readers in _KINDS.items() for reader, suffixes in readers for suffix in suffixes}
KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class Document:
    """A readable file.

    Attributes:
        source: its path relative to the folder, with forward slashes.
        sections: what it says; none only if it is a file that is as it was.
        sha256: of the file.
        kind: of file, one of `KINDS`.
    """

    source: str
    title: str
    sections: tuple[Section, ...]
    sha256: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why.

    Attributes:
        path: its path relative to the folder.
        reason: why.
        sha256: of the file, if it is left out again as long as it stays what it is.
    """

    path: str
    reason: str
    sha256: str = ""


@dataclass(frozen=True)
class File:
    """A file that may be a document, not opened yet.

    Attributes:
        root: the folder that it must not lead out of.
        path: where it is.
        source: what its document is called.
        known: its sha256 when it was read before; a file that still has it is not parsed.
        left_out: why it was left out before; as long as it is the same it is not parsed either.
    """

    root: Path
    path: Path
    source: str
    known: str | None = None
    left_out: Skipped | None = None


def load(
    root: Path, known: Mapping[str, str] | None = None, left_out: Sequence[Skipped] = ()
) -> tuple[list[Document], list[Skipped]]:
    """Read every document below a folder, in the order of the paths; hidden files are passed over.

    Args:
        root: the folder.
        known: sha256 by source; a file that still has it is not parsed, and comes without sections.
        left_out: what was left out before; a file that is still the same is not parsed either.

    Raises:
        DataError: there is no such folder, or no readable document in it.
    """
    documents, skipped = list[Document](), list[Skipped]()
    for found in map(read, files_below(root, known, left_out)):
        if isinstance(found, Document):
            documents.append(found)
        else:
            skipped.append(found)
    if not documents:
        raise nothing_in(root, skipped)
    return documents, skipped


def files_below(
    root: Path, known: Mapping[str, str] | None = None, left_out: Sequence[Skipped] = (), prefix: str = ""
) -> list[File]:
    """Return what `load` reads, in its order; arguments and errors as there, with a `prefix` for all sources."""
    if not root.is_dir():
        came = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"{root} {came}", "a folder of documents", "make index DOCS=path/to/folder")
    before = {s.path: s for s in left_out if s.sha256}
    named = [(path, prefix + path.relative_to(root).as_posix()) for path in _files(root)]
    return [File(root, path, source, (known or {}).get(source), before.get(source)) for path, source in named]


def read(file: File) -> Document | Skipped:
    """Read a file; without sections if it is as it was."""
    try:
        return _read(file.root, file.path, file.source, file.known, file.left_out)
    except Unreadable as error:
        return Skipped(storable(file.source), str(error), error.sha256)


def document_files(root: Path) -> list[Path]:
    """Return the files below a folder that `load` tries to read, in its order."""
    inside = os.path.realpath(root)
    return [path for path in _files(root) if path.suffix.lower() in _READERS and path.is_file()
            and Path(os.path.realpath(path)).is_relative_to(inside)]  # fmt: skip


def nothing_in(root: Path, skipped: Sequence[Skipped]) -> DataError:
    """Return the error for a folder without a readable document."""
    reasons = "".join(f"\n  {s.path}: {s.reason}" for s in skipped[:10])
    more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    return DataError(f"{root} holds no readable document ({len(skipped)} skipped){reasons}{more}",
                     f"at least one non-empty file of type {', '.join(sorted(_READERS))}",
                     "make index DOCS=path/to/folder")  # fmt: skip


def _files(root: Path) -> Iterator[Path]:
    """Yield what is below a folder and not hidden, links too, and the folders that may not be opened, to be reported."""
    found, closed = list[Path](), set[Path]()

    def note(error: OSError) -> None:
        if isinstance(error, PermissionError):
            closed.add(Path(error.filename))
        elif not isinstance(error, FileNotFoundError):  # removed meanwhile
            raise DataError(f"{error.filename} cannot be read: {error.strerror}", "a folder that can be read to its end",
                            "make index DOCS=path/to/folder")  # fmt: skip

    for folder, folders, files in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in [*folders, *files] if not name.startswith(".")]
    yield from (path for path in sorted({*found, *closed}) if path in closed or path.is_file() or path.is_symlink())


def _read(root: Path, path: Path, source: str, known: str | None, left_out: Skipped | None) -> Document:
    if source != storable(source):
        raise Unreadable("the file name is not UTF-8")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise Unreadable("a link that leads out of the folder")
    if not path.is_file():
        linked = path.is_symlink()
        raise Unreadable("a link to a folder or to nothing" if linked else "a folder that may not be opened, or no file any more")
    if path.suffix.lower() not in _READERS:
        raise Unreadable(f"files of type {path.suffix or '(none)'} are not supported")
    kind, reader = _READERS[path.suffix.lower()]
    content = _content(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == known:
        return Document(source, "", (), sha256, kind)
    if left_out and left_out.sha256 == sha256:
        raise Unreadable(left_out.reason, sha256)
    title, sections = _parse(reader, content, path.stem, sha256)
    clean = (replace(s, path=tuple(map(storable, s.path)), text=storable(s.text)) for s in sections)
    kept = tuple(section for section in clean if section.text.strip())
    if not kept:
        raise Unreadable("no text in it", sha256)
    return Document(source, storable(title), kept, sha256, kind)


def _content(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise Unreadable(f"{size} bytes, more than the {MAX_BYTES} that are read of a file")
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {type(error).__name__}: {error.strerror}") from error
    if not content:
        raise Unreadable("0 bytes")
    return content


def _parse(reader: Reader, content: bytes, stem: str, sha256: str) -> Read:
    try:
        return reader(content, stem)
    except Unreadable as error:
        raise Unreadable(str(error), sha256) from error
    except Exception as error:  # whatever a parser raises on a broken file, the other files are still wanted
        raise Unreadable(f"cannot be read: {type(error).__name__}: {error}") from error
