"""What the stores have in common: batches, facts in pieces, filters that a store cannot be told, errors that say what to do.

A filter is put to the store in the store's own form. Where it has none (a pattern, say), the fields of all chunks are read
from the store, the expression is evaluated here, and the search is among the ids that match: exact, and linear in the
number of chunks.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from pipelines.errors import DataError
from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import UNFINISHED, Facts, StoreError, check_dimension
from pipelines.rag.stores.plain import EVERYTHING, NOTHING, CannotSay, Leaf, plain, told
from pipelines.rag.where import Expression, record_of

BATCH = 256  # chunks in a request
IDS = 1000  # in a filter
MAX_K = 10_000  # hits in an answer; no store gives more
PIECE = 30_000  # characters of the facts in a record; Pinecone takes 40 kB, Milvus 64

# What a store with columns needs of a field: whether it holds a whole number, and whether it may be empty.
COLUMNS = {field.name: (str(field.type).startswith("int"), "None" in str(field.type)) for field in fields(Chunk)}
COLUMNS["content_hash"] = (False, False)

_DIGITS = frozenset("0123456789abcdef")
_NAMES = frozenset(field.name for field in fields(Chunk))


class Remote(ABC):
    """A store whose client does the work: see `Store` for what each operation means.

    Args:
        shown: how the store is called in messages.
        troubles: what its client raises.
        end: lets go of the client.
    """

    def __init__(self, shown: str, troubles: tuple[type[Exception], ...], end: Callable[[], None]) -> None:
        self.shown, self._troubles, self._end = shown, troubles, end
        self._closed = False

    def facts(self) -> dict[str, Any] | None:
        """Return the facts; None if there are none, only `UNFINISHED` if their writing was interrupted."""
        with self._explained():
            text = "".join(self._pieces())
        if not text:
            return None
        digest, _, body = text.partition(" ")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            return {UNFINISHED: True}
        found: dict[str, Any] = json.loads(body)
        return found

    def set_facts(self, facts: Facts | None) -> None:
        """Replace the facts."""
        body = json.dumps(facts) if facts is not None else ""
        text = f"{hashlib.sha256(body.encode()).hexdigest()} {body}" if body else ""
        with self._explained():
            self._set_pieces([text[at : at + PIECE] for at in range(0, len(text), PIECE)])

    def ids(self) -> set[str]:
        """Return the ids of all chunks."""
        with self._explained():
            return set(self._ids())

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """Put chunks in, each in place of the one with its id."""
        if vectors.ndim != 2 or len(vectors) != len(chunks):
            raise DataError(f"{len(chunks)} chunks came with vectors of shape {vectors.shape}", "a vector for each chunk")
        if wrong := next((chunk.id for chunk in chunks if not is_id(chunk.id)), None):
            raise DataError(f"{wrong!r} is the id of a chunk", "16 hexadecimal digits")
        if not chunks:
            return
        with self._explained():
            check_dimension(self.shown, self._made(vectors.shape[1]), vectors.shape[1])
            for at in range(0, len(chunks), BATCH):
                self._put(chunks[at : at + BATCH], np.ascontiguousarray(vectors[at : at + BATCH], dtype=np.float32))

    def delete(self, ids: Collection[str]) -> None:
        """Remove chunks; ids that are not there are no problem."""
        gone = sorted(ids)
        with self._explained():
            for at in range(0, len(gone), BATCH):
                if self._dimension() is not None:
                    self._drop(gone[at : at + BATCH])

    def search(self, vector: np.ndarray, k: int, where: Expression | None = None) -> list[tuple[str, float]]:
        """Return (chunk id, cosine) of the `k` nearest chunks that match, or of all that there are, best first."""
        asked, k = EVERYTHING if where is None else plain(where), min(k, MAX_K)
        with self._explained():
            held = self._dimension()
            if held is None or asked == NOTHING:
                return []
            check_dimension(self.shown, held, len(vector))
            if asked == EVERYTHING:
                return self._nearest(vector, k, None)
            if isinstance(asked, Leaf) and (asked.field, asked.operator) == ("id", "in"):
                return self._among([str(value) for value in asked.values if is_id(str(value))], vector, k)
            try:
                said = told(asked, self._leaf, self._every, self._some)
            except CannotSay:
                matching = [chunk.id for chunk, _ in self._scan(vectors=False) if asked.matches(record_of(chunk))]
                return self._among(matching, vector, k)
            return self._nearest(vector, k, said)

    def chunks(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yield every chunk with its vector, in no order."""
        with self._explained():
            for chunk, vector in self._scan(vectors=True):
                yield chunk, np.asarray(vector, dtype=np.float32)

    def close(self) -> None:
        """Let go of connections and locks."""
        if not self._closed:
            self._closed = True
            self._end()

    def _among(self, ids: Sequence[str], vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Return the nearest of some chunks."""
        found: list[tuple[str, float]] = []
        once = tuple(dict.fromkeys(ids))
        for at in range(0, len(once), IDS):
            found += self._nearest(vector, k, self._leaf(Leaf("id", "in", once[at : at + IDS])))
        return sorted(found, key=lambda hit: -hit[1])[:k]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._troubles as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise StoreError(f"{self.shown} failed: {lines[0]}", "a store that answers",
                             "start it, or see its address and its key") from error  # fmt: skip

    @abstractmethod
    def _pieces(self) -> list[str]:
        """Return the pieces of the facts in their order."""

    @abstractmethod
    def _set_pieces(self, pieces: Sequence[str]) -> None:
        """Put pieces in place of those there: first the new ones, so that there are none only if there were none."""

    @abstractmethod
    def _dimension(self) -> int | None:
        """Return the dimension of the vectors, None if nothing was put in yet."""

    @abstractmethod
    def _made(self, dimension: int) -> int:
        """Make what holds the chunks if it is not there, and return its dimension."""

    @abstractmethod
    def _ids(self) -> Iterator[str]:
        """Yield the ids of all chunks."""

    @abstractmethod
    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """Put a batch in."""

    @abstractmethod
    def _drop(self, ids: Sequence[str]) -> None:
        """Remove a batch."""

    @abstractmethod
    def _nearest(self, vector: np.ndarray, k: int, said: Any) -> list[tuple[str, float]]:
        """Return the nearest chunks; `said` is the filter in the store's own form, or None."""

    @abstractmethod
    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        """Yield every chunk, and its vector if it is wanted."""

    @abstractmethod
    def _leaf(self, leaf: Leaf) -> Any:
        """Return a leaf in the store's own form; `CannotSay` if there is none."""

    @abstractmethod
    def _every(self, parts: list[Any]) -> Any:
        """Join with "and"."""

    @abstractmethod
    def _some(self, parts: list[Any]) -> Any:
        """Join with "or"."""


def is_id(text: str) -> bool:
    """Return whether a text can be the id of a chunk, which is what a store may take for granted."""
    return len(text) == 16 and set(text) <= _DIGITS


def fields_of(chunk: Chunk) -> dict[str, Any]:
    """Return what a store keeps of a chunk: all fields that are not None, and the hash of its passage."""
    return {name: value for name, value in asdict(chunk).items() if value is not None} | {"content_hash": chunk.content_hash}


def chunk_of(held: Mapping[str, Any]) -> Chunk:
    """Return the chunk that `fields_of` took apart; numbers may come back as floats."""
    known: dict[str, Any] = {name: value for name, value in held.items() if name in _NAMES}
    known |= {name: int(value) for name, value in known.items() if isinstance(value, float)}
    return Chunk(**known)
