"""The index of a folder of documents: chunks in SQLite, vectors for FAISS, words for BM25, all of one generation.

    vectors.npy           float32, one row for each chunk
    vectors.faiss         only if there are so many that the search is approximate
    words.safetensors     BM25 scores
    chunks.sqlite         the chunks and where they stand

A sync embeds only passages that the current generation lacks; how generations are written is in pipelines.rag.generation.
Run: make index DOCS=path/to/folder
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field, field_validator

from pipelines.config import Config, named
from pipelines.errors import ConfigError, FingerprintMismatch, RunIncomplete, UnknownName
from pipelines.rag import generation, uploads
from pipelines.rag.chunk import Chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import Progress
from pipelines.rag.load import READERS_VERSION, Skipped
from pipelines.rag.workers import Cut, Here, Workers
from pipelines.runs import disk_trouble_is_explained

if TYPE_CHECKING:
    import numpy as np

    from pipelines.rag.lexical import Lexical
    from pipelines.rag.stores.served import StoreVectors
    from pipelines.rag.vectors import Choice, Found, Vectors
    from pipelines.rag.where import Expression

MAX_K = 50
VECTORS, APPROXIMATE, WORDS, CHUNKS = "vectors.npy", "vectors.faiss", "words.safetensors", "chunks.sqlite"

_COLUMNS = tuple(field.name for field in fields(Chunk))
_TABLES = """
CREATE TABLE chunks (
    position INTEGER PRIMARY KEY,  -- row of the vector
    id TEXT NOT NULL UNIQUE, source TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, page INTEGER, kind TEXT NOT NULL, content_hash TEXT NOT NULL
);
CREATE TABLE documents (source TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
"""


class RagConfig(Config):
    """How documents are indexed and how passages are found for a question: configs/rag/*.yaml."""

    embedder: str = Field(description="a name from configs/embedders")
    chunk_max_tokens: int = Field(ge=32, le=256, description="title and text, in the embedder's tokens")
    stemmer: str = Field(description="a Snowball language, or none")
    vectors: Literal["auto", "flat", "hnsw", "ivf-sq8", "ivf-pq"]
    vector_memory_mib: int = Field(ge=1, description="what auto may let the vectors take")
    top_k: int = Field(ge=1, le=MAX_K, description="passages for a question")
    candidates: int = Field(ge=1, le=1000, description="of each kind of search, which are then ranked together")
    store: str = Field("", description="where vectors are searched: nothing for here, else a URL of pipelines.rag.stores")
    screen: bool = Field(description="keep passages that speak to the model out of prompts (pipelines.rag.screen)")
    web_hosts: list[str] = Field(description="that llmlab index fetch may ask")
    dense_weight: float = Field(ge=0, le=1, description="of the vectors in the ranking; the rest is that of the words")
    reranker: str = Field(description="none, or an entry of configs/rerankers, which orders the best candidates again")
    rerank_candidates: int = Field(ge=2, le=200, description="that the reranker reads, or diversity chooses from")
    rerank_weight: float = Field(ge=0, le=1, description="of the reranker; the rest is that of the ranking before it")
    diversity: float = Field(ge=0, lt=1, description="how much the passages for a question shall differ from each other")
    neighbours: int = Field(ge=0, le=5, description="chunks before and behind a passage that the model is shown with it")
    split_questions: bool = Field(description="search the parts of a question that asks several things as well")
    context_max_tokens: int = Field(ge=64, description="of the answering model, for a whole prompt with passages")

    @field_validator("embedder")
    @classmethod
    def _is_in_the_catalogue(cls, name: str) -> str:
        named("embedders", name)
        return name

    @field_validator("reranker")
    @classmethod
    def _is_none_or_in_the_catalogue(cls, name: str) -> str:
        if name != "none":
            named("rerankers", name)
        return name


@dataclass(frozen=True)
class Hit:
    """A chunk that was found.

    Attributes:
        score: what it was ranked by, 0..1 if vectors and words were both asked, else the cosine or the BM25 score.
        cosine: of the angle between question and passage; None if only words were asked.
        row: of the index.
    """

    chunk_id: str
    source: str
    title: str
    text: str
    score: float
    cosine: float | None = None
    page: int | None = None
    row: int = -1


@dataclass(frozen=True)
class Change:
    """What a sync would do or has done, as document sources in the order of their names.

    Attributes:
        added: documents that the index did not have.
        changed: documents that have other chunks now.
        deleted: documents that are gone.
        unchanged: how many are as they were.
        new_chunks: chunks that the index did not have.
        gone_chunks: chunks that are no more.
        to_embed: passages that no chunk of the index has.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    unchanged: int
    new_chunks: int
    gone_chunks: int
    to_embed: int


@dataclass(frozen=True)
class SyncReport:
    """What a sync did."""

    name: str
    generation: str
    documents: int
    chunks: int
    change: Change
    vectors: Choice
    skipped: tuple[Skipped, ...]
    seconds: float


class Index:
    """One generation, read and checked; safe to search from several threads.

    Attributes:
        name: of the index.
        manifest: of the generation.
        generation: its name.
        created: when it was made, in UTC.
        documents: sha256 of each file, by source.
        chunks: in the order of the documents.
        vectors: of the chunks, row by row.
        words: of the chunks, row by row.
    """

    def __init__(self, name: str, manifest: Mapping[str, Any], documents: Mapping[str, str], chunks: Sequence[Chunk],
                 vectors: Vectors | StoreVectors, words: Lexical) -> None:  # fmt: skip
        """Take what `open_index` has read."""
        self.name, self.manifest, self.documents = name, manifest, documents
        self.generation: str = manifest["generation"]
        self.created: str = manifest["created"]
        self.chunks, self.vectors, self.words = tuple(chunks), vectors, words

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.chunks)

    def nearest(self, vector: np.ndarray, k: int, allowed: np.ndarray | None = None, where: str | None = None) -> Found:
        """Return the rows of the `k` chunks (or all) nearest to a vector of shape [dimension], among `allowed` rows.

        A `where` that allows the same rows spares a store a list of them.
        """
        from pipelines.rag.vectors import Vectors

        if isinstance(self.vectors, Vectors):
            return self.vectors.search(vector, k, allowed)
        return self.vectors.search(vector, k, allowed, where)

    def rows_where(self, where: str | Expression) -> np.ndarray:
        """Return the rows of the chunks that an expression matches, in order; `DataError` if it cannot be read."""
        import numpy as np

        from pipelines.rag.where import parse, record_of

        expression = parse(where) if isinstance(where, str) else where
        return np.array([row for row, chunk in enumerate(self.chunks) if expression.matches(record_of(chunk))], dtype=np.int64)

    def hit(self, row: int, score: float, cosine: float | None) -> Hit:
        """Return a chunk as what was found."""
        found = self.chunks[row]
        return Hit(found.id, found.source, found.title, found.text, score, cosine, found.page, row)


def sync(docs: Path | None, name: str, config: RagConfig, embedder: Embedder, on_progress: Progress | None = None,
         workers: Workers | None = None) -> SyncReport:  # fmt: skip
    """Make an index say what a folder of documents and the uploads say (pipelines.rag.uploads); the generation that serves is
    replaced only by a whole one.

    Args:
        docs: folder of documents; None keeps what the index has of one, and reads the uploads only.
        name: lower-case letters, digits and hyphens.
        config: how to chunk and what to build.
        embedder: makes the vectors.
        on_progress: called with a step ("chunk", "embed", "write ...", "switch"), units done, units in all.
        workers: who reads, cuts and embeds; this process if not given. The index is the same whoever does.

    Raises:
        ConfigError: the name is not valid, or a chunk would be longer than the embedder reads.
        DataError: no document can be read, or another process builds the same index.
        DiskFull: a write ran out of space; the current generation goes on serving.
    """
    started, report = time.perf_counter(), on_progress or (lambda *_: None)
    workers = workers or Here(embedder)
    folder = generation.folder_of(name)
    _check_limit(config, embedder)
    with disk_trouble_is_explained(folder), generation.only_writer(folder):
        generation.remove_unfinished(folder)
        before = usable(name, embedder)
        documents, skipped, chunks = _read(docs, name, before, config, workers, report)
        change = _change(before, chunks)
        rows = _vectors_of(chunks, before, embedder, workers, report)
        made_from = docs.resolve().name if docs else before.manifest["docs"] if before else ""
        facts = {"docs": made_from, "fingerprint": embedder.fingerprint, "dimension": embedder.dimension,
                 "readers": READERS_VERSION, "skipped": [asdict(s) for s in skipped]}  # fmt: skip
        made, kind = write(folder, {d.source: d.sha256 for d in documents}, chunks, rows, config, facts, report)
    return SyncReport(name, made, len(documents), len(chunks), change, kind, tuple(skipped), time.perf_counter() - started)


def write(folder: Path, documents: Mapping[str, str], chunks: Sequence[Chunk], rows: np.ndarray, config: RagConfig,
          facts: Mapping[str, Any], report: Progress) -> tuple[str, Choice]:  # fmt: skip
    """Write a generation, let it serve, and return its name and the kind of its vectors; needs `generation.only_writer`.

    Args:
        folder: of the index.
        documents: sha256 by source.
        chunks: row by row.
        rows: their vectors, float32 [chunks, dimension].
        config: what to build.
        facts: for the manifest, beside what follows from the rest.
        report: is told of the steps.
    """
    from pipelines.rag import vectors as nearest
    from pipelines.rag.lexical import Lexical

    report("index", 0, 2)
    words = Lexical.of([c.passage for c in chunks], config.stemmer)
    report("index", 1, 2)
    kind = nearest.choose(len(rows), rows.shape[1], config.vector_memory_mib * 2**20, config.vectors)
    approximate, breadth = nearest.build(rows, kind.kind)
    report("index", 2, 2)
    whole = {
        **facts, "documents": len(documents), "chunks": len(chunks), "config": config.model_dump(),
        "vectors": {"kind": kind.kind, "reason": kind.reason, "breadth": breadth},
    }  # fmt: skip
    files: dict[str, generation.Writer] = {
        VECTORS: partial(_write_rows, rows),
        WORDS: _writer(words.serialised()),
        CHUNKS: _writer(_sqlite_bytes(documents, chunks)),
    }
    if approximate is not None:
        files[APPROXIMATE] = _writer(nearest.serialised(approximate))
    made = generation.write(folder, whole, files, report)
    generation.switch(folder, made, report)
    return made, kind


def diff(docs: Path, name: str, config: RagConfig, embedder: Embedder, on_progress: Progress | None = None) -> Change:
    """Return what `sync` would do; arguments and errors as there."""
    _check_limit(config, embedder)
    generation.folder_of(name)
    before = usable(name, embedder)
    return _change(before, _read(docs, name, before, config, Here(embedder), on_progress or (lambda *_: None))[2])


def open_index(name: str, embedder: Embedder, store: str = "") -> Index:
    """Read the current generation and check it against its manifest.

    Args:
        name: of the index.
        embedder: that it was made with.
        store: where its vectors are searched; a URL of pipelines.rag.stores, or nothing for here.

    Raises:
        StoreError: the store does not answer.
        StoreStale: it holds another generation, or not all of this one.
        ConfigError: the name is not valid.
        UnknownName: there is no such index.
        FingerprintMismatch: the index was made with another embedder.
        RunIncomplete: a file is missing or is not the one that was recorded.
    """
    import numpy as np

    from pipelines.rag import lexical
    from pipelines.rag import vectors as nearest

    folder = generation.folder_of(name)
    serving = generation.current(folder)
    if serving is None:
        existing = ", ".join(generation.index_names()) or "(none yet)"
        raise UnknownName(f"there is no index named {name!r}", f"one of {existing}", generation.AGAIN)
    path = folder / serving
    manifest = generation.manifest_of(path)
    if (manifest["fingerprint"], manifest["dimension"]) != (embedder.fingerprint, embedder.dimension):
        raise FingerprintMismatch(
            f"index {name!r} was made with embedder {manifest['fingerprint'][:12]} of {manifest['dimension']} dimensions",
            f"embedder {embedder.fingerprint[:12]} of {embedder.dimension} dimensions", generation.AGAIN)  # fmt: skip
    with ExitStack() as undone:
        held = None
        if store:
            from pipelines.rag.stores.served import StoreVectors, opened

            held = opened(store, name, manifest)
            undone.callback(held.close)
        files = {file: generation.recorded(path, file, manifest) for file in manifest["files"]}
        rows = np.load(files[VECTORS], mmap_mode="r", allow_pickle=False)
        documents, chunks = _from_sqlite(files[CHUNKS].read_bytes())
        words = lexical.read(files[WORDS].read_bytes())
        if held is not None:
            undone.pop_all()
            return Index(name, manifest, documents, chunks, StoreVectors(held, rows, [c.id for c in chunks]), words)
    approximate, how = nearest.read(files[APPROXIMATE]) if APPROXIMATE in files else None, manifest["vectors"]
    vectors = nearest.Vectors(rows, how["kind"], approximate, how["breadth"])
    return Index(name, manifest, documents, chunks, vectors, words)


def _check_limit(config: RagConfig, embedder: Embedder) -> None:
    if config.chunk_max_tokens > embedder.max_tokens:
        raise ConfigError(f"chunk_max_tokens is {config.chunk_max_tokens}",
                          f"at most {embedder.max_tokens}, which the embedder reads")  # fmt: skip


def _read(
    docs: Path | None, name: str, before: Index | None, config: RagConfig, workers: Workers, report: Progress
) -> tuple[list[Cut], list[Skipped], list[Chunk]]:
    """Return documents, files that were left out, and chunks; a file that is as it was is neither parsed nor cut again."""
    same = before and (before.manifest["readers"], before.manifest["config"]["chunk_max_tokens"]) == (
        READERS_VERSION, config.chunk_max_tokens)  # fmt: skip
    kept = _by_source(before.chunks) if before and same else {}
    left_out = [Skipped(**s) for s in before.manifest["skipped"]] if before and same else []
    known = before.documents if before and same else None
    cut = partial(workers.cut, max_tokens=config.chunk_max_tokens, report=report)
    documents, skipped = uploads.read_with(docs, name, known, left_out, cut)
    chunks = [c for d in documents for c in (kept[d.source] if d.chunks is None else d.chunks)]
    return documents, skipped, chunks


def usable(name: str, embedder: Embedder) -> Index | None:
    """Return the index if its vectors can be used again, else None."""
    try:
        return open_index(name, embedder)
    except (UnknownName, FingerprintMismatch, RunIncomplete):
        return None


def _change(before: Index | None, chunks: Sequence[Chunk]) -> Change:
    old, new = _by_source(before.chunks if before else ()), _by_source(chunks)
    known = {c.content_hash for c in before.chunks} if before else set()
    old_ids, new_ids = ({c.id for part in parts.values() for c in part} for parts in (old, new))
    changed = [s for s in new if s in old and [c.id for c in new[s]] != [c.id for c in old[s]]]
    return Change(
        added=tuple(sorted(new.keys() - old.keys())), changed=tuple(sorted(changed)),
        deleted=tuple(sorted(old.keys() - new.keys())), unchanged=len(new.keys() & old.keys()) - len(changed),
        new_chunks=len(new_ids - old_ids), gone_chunks=len(old_ids - new_ids),
        to_embed=len({c.content_hash for c in chunks} - known),
    )  # fmt: skip


def _by_source(chunks: Sequence[Chunk]) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = {}
    for c in chunks:
        found.setdefault(c.source, []).append(c)
    return found


def _vectors_of(
    chunks: Sequence[Chunk], before: Index | None, embedder: Embedder, workers: Workers, report: Progress
) -> np.ndarray:
    """Return the vectors of all chunks, float32 [chunks, dimension]; only passages that are new are embedded."""
    import numpy as np

    known = {c.content_hash: row for row, c in enumerate(before.chunks)} if before else {}
    new = {c.content_hash: c.passage for c in chunks if c.content_hash not in known}
    made = workers.embed(list(new.values()), report)
    place = {content: row for row, content in enumerate(new)}
    rows = np.empty((len(chunks), embedder.dimension), dtype=np.float32)
    for row, c in enumerate(chunks):
        if before and c.content_hash in known:
            rows[row] = before.vectors.rows[known[c.content_hash]]
        else:
            rows[row] = made[place[c.content_hash]]
    return rows


def _write_rows(rows: np.ndarray, stream: BinaryIO) -> None:
    """Write a .npy file; NumPy's own writer would hide why a write failed."""
    from numpy.lib import format as npy

    npy.write_array_header_1_0(stream, npy.header_data_from_array_1_0(rows))
    stream.write(rows.data)


def _writer(content: bytes) -> generation.Writer:
    def write(stream: BinaryIO) -> None:
        stream.write(content)

    return write


def _sqlite_bytes(documents: Mapping[str, str], chunks: Sequence[Chunk]) -> bytes:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_TABLES)
        database.executemany("INSERT INTO documents VALUES (?, ?)", list(documents.items()))
        rows = [(position, *astuple(c), c.content_hash) for position, c in enumerate(chunks)]
        database.executemany(f"INSERT INTO chunks VALUES ({', '.join('?' * (len(_COLUMNS) + 2))})", rows)
        database.commit()
        return database.serialize()


def _from_sqlite(content: bytes) -> tuple[dict[str, str], list[Chunk]]:
    """Return sha256 by source, and the chunks."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content)
        columns = ", ".join(f'"{column}"' for column in _COLUMNS)
        chunks = [Chunk(*row) for row in database.execute(f"SELECT {columns} FROM chunks ORDER BY position")]
        return dict(database.execute("SELECT source, sha256 FROM documents")), chunks
