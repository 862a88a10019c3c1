"""The index on this machine as a store: searched with FAISS, and written only as whole generations.

What is put in or taken out is kept in memory until whole facts come; then it is written as a new generation, with the
words computed again, and takes the place of the one before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from pipelines.errors import DataError
from pipelines.rag import generation
from pipelines.rag.chunk import Chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import Progress
from pipelines.rag.index import Index, RagConfig, open_index, write
from pipelines.rag.stores.contract import FORMAT, UNFINISHED, Facts, StoreStale, check_dimension
from pipelines.rag.where import Expression
from pipelines.runs import disk_trouble_is_explained

_CARRIED = ("docs", "fingerprint", "dimension", "readers", "skipped")


class Local:
    """An index, or one that is still to be made; see `Store` for what each operation means.

    Args:
        name: of the index.
        embedder: that its vectors are of.
        config: for what the facts of a copy do not say.
        index: if it can be opened.
        report: is told how a generation is written.
    """

    def __init__(self, name: str, embedder: Embedder, config: RagConfig, index: Index | None, report: Progress) -> None:
        self._name, self._embedder, self._config, self._report = name, embedder, config, report
        self._index, self._facts = index, facts_of(index) if index else None
        self._held = {c.id: (c, row) for c, row in zip(index.chunks, index.vectors.rows, strict=True)} if index else {}

    def facts(self) -> dict[str, Any] | None:
        """Return the facts; None if there is no index."""
        return self._facts

    def set_facts(self, facts: Facts | None) -> None:
        """Replace the facts; whole ones write a generation and let it serve."""
        if facts is not None and not facts.get(UNFINISHED):
            self._write(facts)
        else:
            self._facts = None if facts is None else dict(facts)

    def ids(self) -> set[str]:
        """Return the ids of all chunks."""
        return set(self._held)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """Keep chunks for the next generation."""
        if vectors.ndim != 2 or len(vectors) != len(chunks):
            raise DataError(f"{len(chunks)} chunks came with vectors of shape {vectors.shape}", "a vector for each chunk")
        check_dimension(f"index {self._name!r}", self._embedder.dimension, vectors.shape[1])
        self._held |= {c.id: (c, row) for c, row in zip(chunks, vectors, strict=True)}

    def delete(self, ids: Collection[str]) -> None:
        """Leave chunks out of the next generation."""
        for one in ids:
            self._held.pop(one, None)

    def search(self, vector: np.ndarray, k: int, where: Expression | None = None) -> list[tuple[str, float]]:
        """Search the generation that serves."""
        check_dimension(f"index {self._name!r}", self._embedder.dimension, len(vector))
        if self._index is None:
            return []
        found = self._index.nearest(vector, k, None if where is None else self._index.rows_where(where))
        rows, scores = found.rows.tolist(), found.scores.tolist()
        return [(self._index.chunks[row].id, score) for row, score in zip(rows, scores, strict=True)]

    def chunks(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yield every chunk with its vector."""
        yield from list(self._held.values())

    def close(self) -> None:
        """Do nothing: files are mapped, not open."""

    def _write(self, facts: Facts) -> None:
        order = facts["chunks"]
        if set(order) != set(self._held) or len(order) != len(self._held) or not order:
            raise StoreStale(f"{len(self._held)} chunks came for index {self._name!r}, and the facts name {len(order)}",
                             "the chunks that the facts name")  # fmt: skip
        folder = generation.folder_of(self._name)
        rows = np.stack([self._held[one][1] for one in order]).astype(np.float32)
        known = {name: value for name, value in facts["config"].items() if name in RagConfig.model_fields and name != "store"}
        config = RagConfig.model_validate(self._config.model_dump() | known)
        about = {name: facts[name] for name in _CARRIED} | {"copy_of": facts["generation"]}
        with disk_trouble_is_explained(folder), generation.only_writer(folder):
            generation.remove_unfinished(folder)
            write(folder, facts["documents"], [self._held[one][0] for one in order], rows, config, about, self._report)
        self.__init__(self._name, self._embedder, config, open_index(self._name, self._embedder), self._report)  # type: ignore[misc]


def facts_of(index: Index) -> dict[str, Any]:
    """Return what a store must say of an index that it holds whole."""
    carried = {name: index.manifest[name] for name in (*_CARRIED, "config")}
    return carried | {
        "format": FORMAT, "index": index.name, "generation": identity(index.manifest), "created": index.created,
        "documents": dict(index.documents), "chunks": [c.id for c in index.chunks],
    }  # fmt: skip


def identity(manifest: Facts) -> str:
    """Return the generation whose content this is: a copy keeps the name of the one that it was copied from."""
    return str(manifest.get("copy_of") or manifest["generation"])
