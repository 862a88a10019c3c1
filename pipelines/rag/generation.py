"""The files of an index: generations that are whole or not there, one of which serves.

    index/<name>/CURRENT                    the generation that serves
    index/<name>/<generation>/              its files; manifest.json, with a sha256 of each and of itself, is written last

A new generation is written beside the current one and then takes its place in one rename; the one before stays, for readers
that are just opening it. What stands in the files is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipelines.config import ROOT
from pipelines.errors import ConfigError, DataError, RunIncomplete
from pipelines.runs import sync, write_text

CURRENT, MANIFEST, LOCK = "CURRENT", "manifest.json", ".lock"
FORMAT = 4  # of the files of a generation; raise it when they change
AGAIN = "make index DOCS=path/to/folder"

Progress = Callable[[str, int, int], None]
Writer = Callable[[BinaryIO], None]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class Busy(DataError):
    """Another process builds the index."""


def index_root() -> Path:
    """Return the folder of all indexes: `LLMLAB_INDEX`, or `index/` in the repository."""
    return Path(os.environ.get("LLMLAB_INDEX") or ROOT / "index")


def index_names() -> list[str]:
    """Return the names of all indexes that have a generation, sorted."""
    return sorted(path.parent.name for path in index_root().glob(f"*/{CURRENT}"))


def folder_of(name: str) -> Path:
    """Return the folder of an index; `ConfigError` if the name is not valid."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name an index", "lower-case letters, digits and hyphens")
    return index_root() / name


def current(folder: Path) -> str | None:
    """Return the generation that serves, None if there is none."""
    try:
        return (folder / CURRENT).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def manifest_of(path: Path) -> dict[str, Any]:
    """Return the manifest of a generation; `RunIncomplete` if it cannot be read, has another format or was changed."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunIncomplete(f"{path / MANIFEST} cannot be read: {error}", "a manifest", AGAIN) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise RunIncomplete(f"{path} has format {found}", f"format {FORMAT}", AGAIN)
    if manifest.pop("sha256", None) != _sha256_of(manifest):
        raise RunIncomplete(f"{path / MANIFEST} is not what was written", "the sha256 that it records of itself", AGAIN)
    return cast("dict[str, Any]", manifest)


def recorded(path: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """Return a file of a generation; `RunIncomplete` unless it is the one that the manifest records."""
    try:
        found = _sha256(path / name)
    except FileNotFoundError:
        raise RunIncomplete(f"{path / name} is missing", "the file that the manifest lists", AGAIN) from None
    if found != manifest["files"][name]:
        raise RunIncomplete(f"{path / name} is not the file that was recorded", "the recorded sha256", AGAIN)
    return path / name


def write(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Writer], report: Progress) -> str:
    """Write a new generation, the manifest last, and return its name; nothing of it is left if that fails.

    Args:
        folder: of the index.
        facts: for the manifest.
        files: what writes each file.
        report: is told (step, units done, units in all).
    """
    now = datetime.now(UTC)
    generation = now.strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / generation
    path.mkdir()
    steps = len(files) + 1
    hashes = {}
    try:
        for done, (name, writer) in enumerate(files.items()):
            report(f"write {name}", done, steps)
            with (path / name).open("wb") as stream:
                writer(stream)
                stream.flush()
                os.fsync(stream.fileno())
            hashes[name] = _sha256(path / name)
        report(f"write {MANIFEST}", len(files), steps)
        made = {"format": FORMAT, "generation": generation, "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "files": hashes}
        whole = {**facts, **made}
        write_text(path / MANIFEST, _as_json({**whole, "sha256": _sha256_of(whole)}) + "\n")
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    sync(path)
    sync(folder)
    return generation


def switch(folder: Path, generation: str, report: Progress) -> None:
    """Let a generation serve; keep the one before it, for readers that are just opening it."""
    report("switch", 0, 1)
    previous = current(folder)
    write_text(folder / CURRENT, generation + "\n")
    sync(folder)
    report("switch", 1, 1)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in (generation, previous):
            shutil.rmtree(path)


def forget(folder: Path) -> None:
    """Remove every generation and what was learned about them, so that none serves."""
    (folder / CURRENT).unlink(missing_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    sync(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def remove_unfinished(folder: Path) -> None:
    """Remove what a writer left that was killed."""
    for path in folder.iterdir():
        if path.is_dir() and not (path / MANIFEST).exists():
            shutil.rmtree(path)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of an index; the system lets go of it when the process ends, however it ends.

    Raises:
        Busy: another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process builds index {folder.name!r}", "one build at a time") from None
        yield


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_as_json(manifest).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
