"""What a store does, what the facts in it say, and the errors of stores."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import ConfigError, EngineError, FingerprintMismatch, LabError
from pipelines.rag.chunk import Chunk

if TYPE_CHECKING:
    import numpy as np

    from pipelines.rag.where import Expression

FORMAT = 1  # of the facts and of what is kept of a chunk; raise it when they change
UNFINISHED = "unfinished"  # stands in the facts while chunks come and go

Facts = Mapping[str, Any]


class StoreError(EngineError):
    """A store does not answer, or refuses what it was asked."""


class StoreStale(StoreError):
    """A store does not hold what it was opened for, or not all of it."""


class StoreMissing(LabError):
    """The client library of a store is not installed."""

    exit_status = 3


class Store(Protocol):
    """Chunks with their vectors, and facts about the index they are of; safe to search from several threads.

    The facts are a JSON object: format, index, generation, fingerprint and dimension of the embedder, readers, config, docs,
    skipped, created, `documents` (sha256 by source) and `chunks` (ids in the order of the index). They are written last;
    while they hold `UNFINISHED`, the store is not whole, and `documents` are those whose chunks in it are as they will be.
    """

    def facts(self) -> dict[str, Any] | None:
        """Return the facts; None if there are none, only `UNFINISHED` if their writing was interrupted."""

    def set_facts(self, facts: Facts | None) -> None:
        """Replace the facts."""

    def ids(self) -> set[str]:
        """Return the ids of all chunks."""

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """Put chunks in, each in place of the one with its id.

        Args:
            chunks: any number.
            vectors: of length 1, float32 [chunks, dimension].

        Raises:
            FingerprintMismatch: the store holds vectors of another dimension.
        """

    def delete(self, ids: Collection[str]) -> None:
        """Remove chunks; ids that are not there are no problem."""

    def search(self, vector: np.ndarray, k: int, where: Expression | None = None) -> list[tuple[str, float]]:
        """Return (chunk id, cosine) of the `k` chunks nearest to a vector, or of all that there are, best first.

        Args:
            vector: of length 1, shape [dimension].
            k: at least 1; more than 10,000 never come.
            where: only chunks that match are searched, so there are `k` whenever `k` match.
        """

    def chunks(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yield every chunk with its vector, in no order."""

    def close(self) -> None:
        """Let go of connections and locks."""


def whole(facts: Facts | None, url: str, name: str) -> Facts:
    """Return the facts of a store that holds an index whole; `StoreStale` if they say that it does not."""
    if not facts or facts.get(UNFINISHED) or facts.get("format") != FORMAT:
        came = f"an index of format {facts.get('format')}" if facts and not facts.get(UNFINISHED) else "no index, or only a part"
        raise StoreStale(f"the store {url} holds {came}", f"a whole index of format {FORMAT}",
                         f"llmlab index copy {name} --to '{url}'")  # fmt: skip
    return facts


def check_dimension(shown: str, held: int, came: int) -> None:
    """Raise `FingerprintMismatch` if vectors of another dimension come to a store."""
    if held != came:
        raise FingerprintMismatch(f"{shown} holds vectors of {held} dimensions, and {came} came", f"vectors of {held} dimensions",
                                  "the same store with another collection, or the index's own embedder")  # fmt: skip


def checked_name(name: str, what: str, *, hyphen: bool = True) -> str:
    """Return the name of a collection; `ConfigError` unless it is a letter, then up to 47 letters, digits, _ and (maybe) -."""
    marks = "_-" if hyphen else "_"
    if not re.fullmatch(rf"[A-Za-z][A-Za-z0-9{marks}]{{0,47}}", name):
        raise ConfigError(f"{name!r} cannot name a {what}", f"a letter, then at most 47 letters, digits or {' '.join(marks)}")
    return name


def missing(library: str) -> StoreMissing:
    """Return the error for a client library that is not installed."""
    return StoreMissing(f"the library {library} is not installed", "the clients of vector stores", "make setup-stores")
