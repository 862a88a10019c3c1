"""Documents that came over the API: a folder beside the index, whose files belong to the index as those of the folder do.

    index/<name>.documents/        the files; no index can have that name
    uploaded:notes/a.md            the source, in the index, of notes/a.md in there

A sync of a folder (`make index DOCS=folder`) reads them too, so they stay; a sync without one reads only them and leaves the
rest of the index as it is. Links are never followed, and a file is there whole or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import DataError
from pipelines.rag import generation
from pipelines.rag.load import File, Skipped, document_files, files_below, load, nothing_in
from pipelines.rag.workers import Cut

PREFIX = "uploaded:"
MAX_PART_BYTES, MAX_PATH_BYTES, MAX_PARTS = 200, 800, 10
NAME_RULE = "a name such as notes/faq.md that every system can store"

_STAGE = ".incoming-"
_REFUSED = set('\\<>:"|?*')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)


class BadName(DataError):
    """A document's name could lead out of its folder, or not every system can store it."""


class NameTaken(DataError):
    """A folder, or a link, has the name or is on the way to it."""

    http_status = 409


class UnsupportedType(DataError):
    """No reader takes files of this type."""

    http_status = 415


class NoDocuments(DataError):
    """There is nothing to index."""


def folder_of(name: str) -> Path:
    """Return the folder of an index's uploaded documents; `ConfigError` if the index's name is not valid."""
    return generation.folder_of(name).with_name(f"{name}.documents")


def checked_name(name: str) -> str:
    """Return the name of a document in its folder, in Unicode's NFC; `BadName` says what is wrong with it."""
    name = unicodedata.normalize("NFC", name)
    if problem := _problem(name):
        raise BadName(f"the name {ascii(name[:80])} {problem}", NAME_RULE, "")
    return name


def check_readable(name: str, content: bytes) -> None:
    """Read a document as a sync would; `UnsupportedType` or `DataError` with the reason if that does not work."""
    with tempfile.TemporaryDirectory(prefix="llmlab-") as scratch:
        root = Path(scratch)
        (root / Path(name).name).write_bytes(content)
        try:
            load(root)
        except DataError as error:
            reason = error.came.partition("\n")[2].strip()
            kind = DataError if document_files(root) else UnsupportedType
            raise kind(f"not kept: {reason}", error.expected) from None


def put(root: Path, name: str, content: bytes) -> None:
    """Write a document, in place of the one that has the name.

    Raises:
        NameTaken: what has the name, or is on the way to it, is no file or folder.
        OSError: it cannot be written; nothing has changed then.
    """
    root.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=root))
    try:
        with (stage / "file").open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        *folders, last = name.split("/")
        with _inside(root, folders, make=True) as folder:
            if _mode(last, folder) not in (None, stat.S_IFREG):
                raise NameTaken(f"{name} is a folder or a link", "a name for a file", "choose another name")
            os.rename(stage / "file", last, dst_dir_fd=folder)
            os.fsync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove(root: Path, name: str) -> bool:
    """Remove a document and the folders that it leaves empty; False if there is none of that name."""
    *folders, last = name.split("/")
    try:
        with _inside(root, folders) as folder:
            if _mode(last, folder) != stat.S_IFREG:
                return False
            os.unlink(last, dir_fd=folder)
            os.fsync(folder)
    except (FileNotFoundError, NameTaken):
        return False
    for depth in range(len(folders), 0, -1):
        try:
            with _inside(root, folders[: depth - 1]) as folder:
                os.rmdir(folders[depth - 1], dir_fd=folder)
        except OSError:
            break
    return True


def files(root: Path) -> dict[str, Path]:
    """Return the documents of a folder by their names; links are left out."""
    found = {path.relative_to(root).as_posix(): path for path in document_files(root)} if root.is_dir() else {}
    return {name: path for name, path in found.items() if not any(p.is_symlink() for p in _way(root, path))}


def remove_unfinished(root: Path) -> None:
    """Remove what a writer left that was killed."""
    for stage in root.glob(f"{_STAGE}*"):
        shutil.rmtree(stage, ignore_errors=True)


def read_with(
    docs: Path | None,
    name: str,
    known: Mapping[str, str] | None,
    skipped: Sequence[Skipped],
    read_all: Callable[[Sequence[File]], Sequence[Cut | Skipped]],
) -> tuple[list[Cut], list[Skipped]]:
    """Read the documents of a folder and those that were uploaded.

    Args:
        docs: the folder; None keeps what the index has of one.
        name: of the index.
        known: sha256 by source of the index as it is; None if its chunks cannot be used again.
        skipped: what was left out when the index was made.
        read_all: reads files.

    Raises:
        NoDocuments: there are none.
        DataError: no document of the folder can be read, or what the index has of one cannot be kept.
    """
    root = folder_of(name)
    uploaded = {PREFIX + upload for upload in files(root)}
    in_folder = files_below(docs, known, skipped) if docs else []
    found = read_all([*in_folder, *(files_below(root, known, skipped, PREFIX) if uploaded else ())])
    here, sent = found[: len(in_folder)], found[len(in_folder) :]
    if docs and not any(isinstance(one, Cut) for one in here):
        raise nothing_in(docs, [one for one in here if isinstance(one, Skipped)])
    documents = [] if docs else _kept(name, known)
    left_out = [] if docs else [s for s in skipped if not s.path.startswith(PREFIX)]
    documents += [one for one in here if isinstance(one, Cut)]
    documents += [one for one in sent if isinstance(one, Cut) and one.source in uploaded]
    left_out += [one for one in found if isinstance(one, Skipped)]
    if not documents:
        raise NoDocuments(f"index {name!r} has no document", "a folder of documents, or an upload", generation.AGAIN)
    return documents, left_out


def _kept(name: str, known: Mapping[str, str] | None) -> list[Cut]:
    folder = generation.folder_of(name)
    serving = generation.current(folder)
    if known is None and serving and generation.manifest_of(folder / serving)["docs"]:
        raise DataError(f"index {name!r} has a folder's documents that were cut or embedded in another way",
                        "the settings that it was made with", generation.AGAIN)  # fmt: skip
    return [Cut(source, sha) for source, sha in (known or {}).items() if not source.startswith(PREFIX)]


def _problem(name: str) -> str | None:
    if len(name.encode("utf-8", "replace")) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    parts = name.split("/")
    if len(parts) > MAX_PARTS:
        return f"has more than {MAX_PARTS} parts"
    return next((problem for part in parts if (problem := _problem_of_part(part))), None)


def _problem_of_part(part: str) -> str | None:
    if not part:
        return "is empty, absolute, or has an empty part"
    if part.startswith("."):
        return "is hidden, or leads to another folder"
    if bad := next((c for c in part if c in _REFUSED or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")), None):
        return f"has the character {ascii(bad)}"
    if part[-1] in " ." or part[0] == " ":
        return "has a part that begins or ends with a space or ends with a dot"
    if _DEVICE.fullmatch(part.rstrip(" .")):
        return "is a device on Windows"
    return f"has a part longer than {MAX_PART_BYTES} bytes" if len(part.encode()) > MAX_PART_BYTES else None


@contextmanager
def _inside(root: Path, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of a folder below the root, reached without following a link below it."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            if make and _mode(folder, descriptor) is None:
                os.mkdir(folder, dir_fd=descriptor)
            if _mode(folder, descriptor) not in (None, stat.S_IFDIR):
                raise NameTaken(f"{folder} is a file or a link", "a folder", "choose another name")
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _mode(name: str, folder: int) -> int | None:
    """Return what kind of file a name is, without following it; None if there is none."""
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _way(root: Path, path: Path) -> Iterator[Path]:
    """Yield a path and its parents below the root."""
    while path != root:
        yield path
        path = path.parent
