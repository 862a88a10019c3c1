"""The documents that a client may add and remove, and the index that follows them in the background.

One sync runs at a time; what changes meanwhile is joined into the next. The files are kept by pipelines.rag.uploads, unless
`documents` names a folder: then it is that folder that changes, and the index says what it says.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from monitoring.metrics import DOCUMENT_STATES, INDEX_DOCUMENTS
from pipelines.errors import LabError, UnknownName
from pipelines.rag import generation, uploads
from pipelines.runs import disk_trouble_is_explained
from serving.knowledge import Knowledge
from serving.problems import BadRequest, BodyTooLarge, unexpected
from serving.settings import ServeConfig

COUNT_SECONDS = 10.0  # between two counts for the metrics; each looks at every file
BUSY_SECONDS = 2.0  # until an index that another process builds is tried again

State = Literal["indexed", "pending", "skipped", "deleting"]


class TooManyDocuments(BadRequest):
    """The folder holds as many documents as it may."""

    http_status = 409


class OtherFolder(BadRequest):
    """The index says what another folder says, which a sync would make it forget."""

    http_status = 409


class DocumentMissing(UnknownName):
    """There is no document of that name."""


@dataclass(frozen=True)
class Entry:
    """A document.

    Attributes:
        path: its name in the folder.
        source: its name in the index.
        sha256: of the file.
        size: of the file, in bytes.
        chunks: how many the serving generation has of it.
        state: indexed, if the serving generation has just this file; pending, before a sync has seen it; skipped, if the sync
            could not read it; deleting, if the file is gone and the index still has it.
        reason: why it is skipped.
    """

    path: str
    source: str
    sha256: str
    size: int
    chunks: int
    state: State
    reason: str | None = None


class Documents:
    """The documents of an index; safe to use from several threads.

    Attributes:
        root: the folder that changes.
        problem: why the last sync failed, or None.
    """

    def __init__(self, knowledge: Knowledge, config: ServeConfig) -> None:
        """Take the index and the limits."""
        self.knowledge, self.config = knowledge, config
        self._own = config.documents is None
        self.root = Path(config.documents).expanduser() if config.documents else uploads.folder_of(knowledge.name)
        self._prefix = uploads.PREFIX if self._own else ""
        self.problem: LabError | None = None
        self._changing, self._lock = threading.Lock(), threading.Lock()
        self._wanted = self._running = False
        self._counted = float("-inf")
        self._hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}

    @property
    def syncing(self) -> bool:
        """Tell whether a sync runs or is about to."""
        return self._running

    def start(self) -> None:
        """Go on with what a stop of the server interrupted."""
        uploads.remove_unfinished(self.root)
        if self._own and any(entry.state in ("pending", "deleting") for entry in self.entries()):
            self._ask()

    def entries(self) -> list[Entry]:
        """Return the documents, in the order of their names; also those that are gone and still found."""
        retriever = self.knowledge.retriever
        index = retriever.index if retriever else None
        indexed = dict(index.documents) if index else {}
        chunks = Counter(c.source for c in index.chunks) if index else Counter()
        left_out = {s["path"]: s["reason"] for s in index.manifest["skipped"]} if index else {}
        found = []
        for name, path in uploads.files(self.root).items():
            try:
                sha, size = self._sha256(path), path.stat().st_size
            except FileNotFoundError:
                continue  # removed just now
            source = self._prefix + name
            state: State = "indexed" if indexed.pop(source, None) == sha else "pending"
            if state == "pending" and source in left_out and not self._running:
                state = "skipped"
            reason = left_out.get(source) if state == "skipped" else None
            found.append(Entry(name, source, sha, size, chunks[source], state, reason))
        gone = [source for source in indexed if source.startswith(self._prefix)] if self._own or self._is_of_index() else []
        found += [Entry(s.removeprefix(self._prefix), s, indexed[s], 0, chunks[s], "deleting") for s in gone]
        return sorted(found, key=lambda entry: entry.path)

    def count(self) -> None:
        """Show in the metrics how many documents there are in each state, as they were up to `COUNT_SECONDS` ago.

        A folder that cannot be read leaves the figures as they were: the rest of the metrics matters more then.
        """
        now = time.monotonic()
        if now - self._counted < COUNT_SECONDS:
            return
        self._counted = now
        try:
            counts: Counter[str] = Counter(entry.state for entry in self.entries())
        except (OSError, LabError):
            return
        for state in DOCUMENT_STATES:
            INDEX_DOCUMENTS.labels(state=state).set(counts[state])

    def add(self, name: str, content: bytes) -> Entry:
        """Keep a document, in place of the one that has its name, and have the index follow.

        Raises:
            BadName, UnsupportedType, DataError: it cannot be kept; says why.
            BodyTooLarge, TooManyDocuments, OtherFolder: it may not be kept.
            DiskFull, NotWritable: it could not be written.
        """
        name = uploads.checked_name(name)
        if len(content) > self.config.max_document_bytes:
            raise BodyTooLarge(f"the document has {len(content)} bytes", f"at most {self.config.max_document_bytes} bytes")
        self._check_folder()
        with disk_trouble_is_explained(self.root):
            uploads.check_readable(name, content)
        with self._changing, disk_trouble_is_explained(self.root):
            there = uploads.files(self.root)
            if name not in there and len(there) >= self.config.max_documents:
                raise TooManyDocuments(f"there are {len(there)} documents", f"at most {self.config.max_documents}",
                                       "remove one, or serve with more max_documents")  # fmt: skip
            uploads.put(self.root, name, content)
        self._ask()
        return self.entry(name)

    def remove(self, name: str) -> Entry:
        """Remove a document and have the index forget it; `DocumentMissing` if there is none of that name."""
        self._check_folder()
        before = self.entry(name)
        with self._changing, disk_trouble_is_explained(self.root):
            removed = uploads.remove(self.root, before.path)
        if not removed and before.state != "deleting":
            raise _missing(name)
        self._ask()
        return Entry(before.path, before.source, before.sha256, 0, before.chunks, "deleting")

    def entry(self, name: str) -> Entry:
        """Return one document; `DocumentMissing` if there is none of that name."""
        name = uploads.checked_name(name)
        found = next((entry for entry in self.entries() if entry.path == name), None)
        if found is None:
            raise _missing(name)
        return found

    def _check_folder(self) -> None:
        if not self._own and not self._is_of_index():
            made_from = self._made_from()
            raise OtherFolder(f"index {self.knowledge.name!r} says what the folder {made_from!r} says",
                              f"an index of the folder {self.root.resolve().name!r}, which documents names",
                              f"llmlab index sync {self.root}, or serve with another index")  # fmt: skip

    def _is_of_index(self) -> bool:
        return self._made_from() in (None, "", self.root.resolve().name)

    def _made_from(self) -> str | None:
        serving = generation.current(self.knowledge.folder)
        return str(generation.manifest_of(self.knowledge.folder / serving)["docs"]) if serving else None

    def _sha256(self, path: Path) -> str:
        status = path.stat()
        mark = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._hashes.get(path, (None, ""))[0] != mark:
            with path.open("rb") as stream:
                self._hashes[path] = (mark, hashlib.file_digest(stream, "sha256").hexdigest())
        return self._hashes[path][1]

    def _ask(self) -> None:
        """Have the index follow, now or after the sync that runs."""
        with self._lock:
            self._wanted = True
            if not self._running:
                self._running = True
                threading.Thread(target=self._follow, name="index-sync", daemon=True).start()

    def _follow(self) -> None:
        while self._next():
            try:
                if self._own or uploads.files(self.root):
                    self.knowledge.sync(None if self._own else self.root)
                else:
                    self.knowledge.forget()
                self.problem = None
            except generation.Busy as problem:
                self.problem, self._wanted = problem, True
                time.sleep(BUSY_SECONDS)
            except LabError as problem:
                self.problem = problem
            except Exception as error:  # the thread must go on, and the list must say it
                self.problem = unexpected(error)

    def _next(self) -> bool:
        with self._lock:
            self._running, self._wanted = self._wanted, False
            return self._running


def _missing(name: str) -> DocumentMissing:
    return DocumentMissing(f"there is no document {ascii(name[:80])}", "a path that GET /v1/documents lists")
