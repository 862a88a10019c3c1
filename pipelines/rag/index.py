"""The index of a folder of documents: FAISS vectors and SQLite chunks, in generations, switched atomically.

    index/<name>/CURRENT                    the generation that serves
    index/<name>/<generation>/              vectors.faiss, chunks.sqlite, manifest.json (written last)

A build embeds only passages that the current generation lacks, and keeps one generation besides its own.
Search is exact and dense, over one index held in memory. Run: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import ROOT, Config
from pipelines.errors import ConfigError, DataError, FingerprintMismatch, RunIncomplete, UnknownName
from pipelines.rag.chunk import Chunk, chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.load import Document, Skipped, load
from pipelines.runs import disk_trouble_is_explained, sync, write_text

if TYPE_CHECKING:
    import numpy as np

MAX_K = 50
CURRENT, MANIFEST, VECTORS, CHUNKS = "CURRENT", "manifest.json", "vectors.faiss", "chunks.sqlite"
FORMAT = 1  # of the files of a generation; raise it when they change

Progress = Callable[[str, int, int], None]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_AGAIN = "make index DOCS=path/to/folder"
_COLUMNS = tuple(field.name for field in fields(Chunk))
_TABLE = """
CREATE TABLE chunks (
    position INTEGER PRIMARY KEY,  -- row of the vector in the FAISS file
    id TEXT NOT NULL UNIQUE, source TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, page INTEGER, content_hash TEXT NOT NULL
)"""


class RagConfig(Config):
    """How documents are indexed and how many passages a question gets: configs/rag/*.yaml."""

    embedder: Literal["minilm"]
    chunk_max_tokens: int = Field(ge=32, le=256, description="title and text, in the embedder's tokens")
    top_k: int = Field(ge=1, le=MAX_K, description="passages for a question")


@dataclass(frozen=True)
class Hit:
    """A chunk that was found; `score` is the cosine of the angle between question and passage."""

    chunk_id: str
    source: str
    title: str
    text: str
    score: float
    page: int | None = None


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        embedded: passages that were new and had to be embedded.
        reused: chunks whose passage was known before, or stands in the documents more than once.
        removed: chunks of the previous generation that are gone.
    """

    name: str
    generation: str
    documents: int
    chunks: int
    embedded: int
    reused: int
    removed: int
    skipped: tuple[Skipped, ...]
    seconds: float


class Index:
    """One generation, read into memory and checked; safe to search from several threads."""

    def __init__(self, name: str, manifest: Mapping[str, Any], vectors: Any, chunks: Sequence[Chunk]) -> None:
        """Take what `open_index` has read: `vectors` is the FAISS index, row i belongs to `chunks[i]`."""
        self.name, self.manifest = name, manifest
        self.generation: str = manifest["generation"]
        self.created: str = manifest["created"]
        self._vectors, self._chunks = vectors, tuple(chunks)

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._chunks)

    def chunks(self) -> tuple[Chunk, ...]:
        """Return all chunks in the order of the documents."""
        return self._chunks

    def vectors(self) -> np.ndarray:
        """Return all vectors, float32, shape [chunks, dimension], in the order of `chunks`."""
        rows: np.ndarray = self._vectors.reconstruct_n(0, len(self))
        return rows

    def search(self, vector: np.ndarray, k: int) -> list[Hit]:
        """Return the `k` chunks (or all) nearest to a vector of shape [dimension], best first."""
        scores, rows = self._vectors.search(vector.reshape(1, -1), min(k, len(self)))
        return [_hit(self._chunks[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]


def index_root() -> Path:
    """Return the folder of all indexes: `LLMLAB_INDEX`, or `index/` in the repository."""
    return Path(os.environ.get("LLMLAB_INDEX") or ROOT / "index")


def build(docs: Path, name: str, config: RagConfig, embedder: Embedder, on_progress: Progress | None = None) -> BuildReport:
    """Index a folder of documents; the generation that serves is replaced only when the new one is whole.

    Args:
        docs: folder of documents.
        name: lower-case letters, digits and hyphens.
        config: how to chunk.
        embedder: makes the vectors.
        on_progress: called with a step ("chunk", "embed", "write ...", "switch"), units done, units in all.

    Raises:
        ConfigError: the name is not valid, or a chunk would be longer than the embedder reads.
        DataError: no document can be read, or the same index is being built by another process.
        DiskFull: a write ran out of space; the current generation goes on serving.
    """
    started, report = time.perf_counter(), on_progress or (lambda *_: None)
    folder = _folder(name)
    _check_limit(config, embedder)
    documents, skipped = load(docs)
    with disk_trouble_is_explained(folder), _only_builder(folder):
        _remove_unfinished(folder)
        chunks = _chunk_all(documents, config, embedder, report)
        known, old_ids = _known_vectors(name, embedder)
        vectors, embedded = _embed_new(chunks, known, embedder, report)
        facts = {
            "format": FORMAT, "docs": docs.resolve().name, "documents": len(documents), "chunks": len(chunks),
            "fingerprint": embedder.fingerprint, "dimension": embedder.dimension,
            "config": config.model_dump(), "skipped": [asdict(s) for s in skipped],
        }  # fmt: skip
        generation = _write_generation(folder, facts, vectors, chunks, report)
        _switch(folder, generation, report)
    return BuildReport(
        name, generation, documents=len(documents), chunks=len(chunks), embedded=embedded,
        reused=len(chunks) - embedded, removed=len(old_ids - {c.id for c in chunks}), skipped=tuple(skipped),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def open_index(name: str, embedder: Embedder) -> Index:
    """Read the current generation and check it against its manifest.

    Raises:
        ConfigError: the name is not valid.
        UnknownName: there is no such index.
        FingerprintMismatch: the index was made with another embedder.
        RunIncomplete: a file is missing or is not the one that was recorded.
    """
    folder = _folder(name)
    generation = _current(folder)
    if generation is None:
        existing = ", ".join(index_names()) or "(none yet)"
        raise UnknownName(f"there is no index named {name!r}", f"one of {existing}", _AGAIN)
    manifest = _manifest(folder / generation)
    if manifest["fingerprint"] != embedder.fingerprint:
        raise FingerprintMismatch(f"index {name!r} was made with embedder {manifest['fingerprint'][:12]}",
                                  f"embedder {embedder.fingerprint[:12]}", _AGAIN)  # fmt: skip
    import faiss
    import numpy as np

    vectors = np.frombuffer(_recorded(folder / generation, VECTORS, manifest), dtype=np.uint8)
    chunks = _chunks_from_sqlite(_recorded(folder / generation, CHUNKS, manifest))
    return Index(name, manifest, faiss.deserialize_index(vectors), chunks)


def index_names() -> list[str]:
    """Return the names of all indexes that have a generation, sorted."""
    return sorted(path.parent.name for path in index_root().glob(f"*/{CURRENT}"))


def _folder(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name an index", "lower-case letters, digits and hyphens")
    return index_root() / name


def _check_limit(config: RagConfig, embedder: Embedder) -> None:
    if config.chunk_max_tokens > embedder.max_tokens:
        raise ConfigError(f"chunk_max_tokens is {config.chunk_max_tokens}",
                          f"at most {embedder.max_tokens}, which the embedder reads")  # fmt: skip


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Hold the lock of an index; the system lets go of it when the process ends, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process builds index {folder.name!r}", "one build at a time") from None
        yield


def _chunk_all(documents: Sequence[Document], config: RagConfig, embedder: Embedder, report: Progress) -> list[Chunk]:
    chunks: list[Chunk] = []
    for done, document in enumerate(documents, 1):
        chunks += chunk(document, config.chunk_max_tokens, embedder.token_count)
        report("chunk", done, len(documents))
    return chunks


def _known_vectors(name: str, embedder: Embedder) -> tuple[dict[str, np.ndarray], set[str]]:
    """Return the current generation's vectors by content hash, and its chunk ids; none if unusable."""
    try:
        index = open_index(name, embedder)
    except (UnknownName, FingerprintMismatch, RunIncomplete):
        return {}, set()
    by_hash = {c.content_hash: row for c, row in zip(index.chunks(), index.vectors(), strict=True)}
    return by_hash, {c.id for c in index.chunks()}


def _embed_new(
    chunks: Sequence[Chunk], known: dict[str, np.ndarray], embedder: Embedder, report: Progress
) -> tuple[np.ndarray, int]:
    """Return the vectors of all chunks, and how many passages had to be embedded for them."""
    import numpy as np

    new = {c.content_hash: c.passage for c in chunks if c.content_hash not in known}
    rows = embedder.embed(list(new.values()), lambda done, total: report("embed", done, total))
    known = known | dict(zip(new, rows, strict=True))
    return np.stack([known[c.content_hash] for c in chunks]), len(new)


def _write_generation(folder: Path, facts: dict[str, Any], vectors: np.ndarray, chunks: Sequence[Chunk], report: Progress) -> str:
    """Write the files of a new generation, the manifest last, and return its name."""
    now = datetime.now(UTC)
    generation = now.strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / generation
    path.mkdir()
    contents = {VECTORS: _faiss_bytes(vectors), CHUNKS: _sqlite_bytes(chunks)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    facts |= {"generation": generation, "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "files": hashes}
    try:
        for done, (name, content) in enumerate(contents.items()):
            report(f"write {name}", done, len(contents) + 1)
            _write_bytes(path / name, content)
        report(f"write {MANIFEST}", len(contents), len(contents) + 1)
        write_text(path / MANIFEST, json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    sync(path)
    sync(folder)
    return generation


def _switch(folder: Path, generation: str, report: Progress) -> None:
    """Let the new generation serve; keep the one before it, for readers that are just opening it."""
    report("switch", 0, 1)
    previous = _current(folder)
    write_text(folder / CURRENT, generation + "\n")
    sync(folder)
    report("switch", 1, 1)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in (generation, previous):
            shutil.rmtree(path)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not (path / MANIFEST).exists():
            shutil.rmtree(path)


def _current(folder: Path) -> str | None:
    try:
        return (folder / CURRENT).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise RunIncomplete(f"{path / MANIFEST} cannot be read: {error}", "a manifest", _AGAIN) from None
    if manifest.get("format") != FORMAT:
        raise RunIncomplete(f"{path} has format {manifest.get('format')}", f"format {FORMAT}", _AGAIN)
    return manifest


def _recorded(path: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Return the content of a file of a generation, which must be the one that its manifest records."""
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        raise RunIncomplete(f"{path / name} is missing", "the file that the manifest lists", _AGAIN) from None
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
        raise RunIncomplete(f"{path / name} is not the file that was recorded", "the recorded sha256", _AGAIN)
    return content


def _faiss_bytes(vectors: np.ndarray) -> bytes:
    """Return the content of a FAISS file; FAISS's own writer would hide why a write failed."""
    import faiss

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    content: bytes = faiss.serialize_index(flat).tobytes()
    return content


def _sqlite_bytes(chunks: Sequence[Chunk]) -> bytes:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(_TABLE)
        rows = [(position, *astuple(c), c.content_hash) for position, c in enumerate(chunks)]
        database.executemany(f"INSERT INTO chunks VALUES ({', '.join('?' * (len(_COLUMNS) + 2))})", rows)
        database.commit()
        return database.serialize()


def _chunks_from_sqlite(content: bytes) -> list[Chunk]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content)
        columns = ", ".join(f'"{column}"' for column in _COLUMNS)
        return [Chunk(*row) for row in database.execute(f"SELECT {columns} FROM chunks ORDER BY position")]


def _hit(found: Chunk, score: float) -> Hit:
    return Hit(found.id, found.source, found.title, found.text, score, found.page)


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
