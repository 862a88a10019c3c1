"""Vectors that are searched in a store instead of here; everything else of the index stays on this machine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from pipelines.rag.stores import open_store
from pipelines.rag.stores.contract import Facts, Store, StoreStale, whole
from pipelines.rag.stores.local import identity
from pipelines.rag.vectors import Found
from pipelines.rag.where import Comparison, Expression, parse


def opened(url: str, name: str, manifest: Facts) -> Store:
    """Open a store and see that it holds a generation whole.

    Raises:
        StoreError: it cannot be opened.
        StoreStale: it holds something else.
    """
    store = open_store(url)
    try:
        check_holds(store.facts(), name, manifest, url)
    except BaseException:
        store.close()
        raise
    return store


class StoreVectors:
    """The vectors of an index in a store; safe to search from several threads.

    Args:
        store: holds them; closed when nothing searches any more.
        rows: the vectors here, for cosines of what the words found.
        ids: of the chunks, row by row.
    """

    def __init__(self, store: Store, rows: np.ndarray, ids: Sequence[str]) -> None:
        self.rows, self._store, self._ids = rows, store, ids
        self._row_of = {one: row for row, one in enumerate(ids)}
        weakref.finalize(self, store.close)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def search(self, vector: np.ndarray, k: int, allowed: np.ndarray | None = None, where: str | None = None) -> Found:
        """Return the `k` rows nearest to a vector, or all that there are.

        Args:
            vector: shape [dimension].
            k: at least 1.
            allowed: sorted row numbers; only they are searched.
            where: an expression that allows the same rows; without one their ids are sent.
        """
        most = len(self) if allowed is None else len(allowed)
        asked = wanted = min(k, most)
        expression: Expression | None = parse(where) if where is not None else None
        if where is None and allowed is not None:
            expression = Comparison("id", "=", tuple(self._ids[row] for row in allowed))
        rows = np.zeros(0, dtype=np.int64)
        while asked:
            found = self._store.search(vector, asked, expression)
            rows = np.array([self._row_of[one] for one, _ in found if one in self._row_of], dtype=np.int64)
            if len(rows) >= wanted or len(found) < asked:  # while a copy runs, chunks of the next generation are among them
                break
            asked *= 2
        scores = self.rows[rows] @ vector
        best = np.argsort(-scores, kind="stable")[:wanted]
        return Found(rows[best], scores[best])


def check_holds(facts: Facts | None, name: str, manifest: Facts, url: str) -> None:
    """Raise `StoreStale` unless the facts of a store say that it holds a generation whole."""
    held = whole(facts, url, name)
    came = tuple(held.get(key) for key in ("generation", "fingerprint", "dimension"))
    if came != (identity(manifest), manifest["fingerprint"], manifest["dimension"]):
        raise StoreStale(f"the store {url} holds generation {came[0]} of index {held.get('index')!r}",
                         f"generation {identity(manifest)} of index {name!r}, of the same embedder",
                         f"llmlab index copy {name} --to '{url}'")  # fmt: skip
