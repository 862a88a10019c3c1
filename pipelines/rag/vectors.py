"""Nearest vectors with FAISS: exact while that is fast, approximate beyond, filtered before the search.

The rows themselves lie in a NumPy file that is mapped, not read; an approximate index is built beside it. How widely an
approximate index looks is found when it is built: as little as finds `RECALL` of the exact neighbours of sample queries.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

Kind = Literal["flat", "hnsw", "ivf-sq8", "ivf-pq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FEWEST_APPROXIMATE_ROWS = 1000  # of fewer, no codes can be learnt
FLAT_ROWS = 50_000  # a search of so many takes as long as embedding the question on 2 CPU cores
GATHER_ROWS = 4096  # of so many allowed rows the vectors are copied and compared one by one
HNSW_NEIGHBOURS, HNSW_BUILD_BREADTH = 32, 100
PQ_DIMENSIONS = 4  # in a byte of a product code
RESCORED = 4  # times as many rows as wanted are compared exactly where the index holds codes
RECALL, SAMPLE_QUERIES, SAMPLE_K = 0.985, 128, 10
SAMPLE_COSINE = 0.7  # of a sample query and the row it is made from, as of a question and its passage
TRAINING_ROWS_PER_LIST = 64


class Choice(NamedTuple):
    """A kind of index and the reason for it."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Found:
    """Rows nearest to a vector, best first, and their inner products with it."""

    rows: np.ndarray
    scores: np.ndarray


def choose(rows: int, dimension: int, memory_bytes: int, asked: str = "auto") -> Choice:
    """Return the kind of index for so many rows.

    Args:
        rows: how many vectors.
        dimension: of each.
        memory_bytes: what an index may take.
        asked: one of `KINDS`, or "auto".
    """
    if asked != "auto" and (rows >= FEWEST_APPROXIMATE_ROWS or asked == "flat"):
        return Choice(cast("Kind", asked), "asked for by name")
    if rows < FEWEST_APPROXIMATE_ROWS:
        return Choice("flat", f"{rows} vectors are too few for anything else")
    if rows <= FLAT_ROWS and rows * bytes_per_row("flat", dimension) <= memory_bytes:
        return Choice("flat", f"{rows} vectors are at most {FLAT_ROWS}, which an exact search does in milliseconds")
    fits = [kind for kind in KINDS[1:] if rows * bytes_per_row(kind, dimension) <= memory_bytes]
    kind: Kind = fits[0] if fits else KINDS[-1]
    size = f"{rows * bytes_per_row(kind, dimension) / 1e6:.0f} MB"
    return Choice(kind, f"{rows} vectors take {size} so, and {memory_bytes / 1e6:.0f} MB are allowed")


def bytes_per_row(kind: Kind, dimension: int) -> int:
    """Return about how much memory a row takes in an index of a kind."""
    return {
        "flat": 4 * dimension,
        "hnsw": 4 * dimension + 2 * 4 * HNSW_NEIGHBOURS + 16,
        "ivf-sq8": dimension + 8,
        "ivf-pq": dimension // PQ_DIMENSIONS + 8,
    }[kind]  # fmt: skip


class Vectors:
    """The vectors of an index; safe to search from several threads.

    Args:
        rows: float32 of length 1, shape [rows, dimension]; may be a mapped file.
        kind: of the index.
        approximate: a built index for any kind but "flat".
        breadth: how widely it looks: efSearch of HNSW, nprobe of an inverted file.
    """

    def __init__(self, rows: np.ndarray, kind: Kind, approximate: Any = None, breadth: int = 0) -> None:
        self.rows, self.kind, self.breadth = rows, kind, breadth
        if approximate is None:
            approximate = _faiss().IndexFlatIP(rows.shape[1])
            approximate.add(np.ascontiguousarray(rows, dtype=np.float32))
        self._index = approximate

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def search(self, vector: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        """Return the `k` rows nearest to a vector, or all that there are.

        Args:
            vector: shape [dimension].
            k: at least 1.
            allowed: sorted row numbers; only they are searched, so there are `k` whenever `k` are allowed.
        """
        k = min(k, len(self) if allowed is None else len(allowed))
        if k == 0:
            return Found(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        if allowed is not None and len(allowed) <= GATHER_ROWS:
            return self._exact(vector, k, allowed)
        rows = self._candidates(vector, k, allowed)
        if len(rows) < k:  # an approximate index may run out of allowed rows where it looks
            return self._exact(vector, k, np.arange(len(self)) if allowed is None else allowed)
        return self._exact(vector, k, rows)

    def _candidates(self, vector: np.ndarray, k: int, allowed: np.ndarray | None) -> np.ndarray:
        wanted = k if self.kind in ("flat", "hnsw") else min(RESCORED * k, len(self))
        _, found = self._index.search(
            vector.reshape(1, -1), wanted, params=_parameters(self.kind, self.breadth, allowed, len(self))
        )
        rows: np.ndarray = found[0][found[0] >= 0]
        return rows

    def _exact(self, vector: np.ndarray, k: int, rows: np.ndarray) -> Found:
        scores = self.rows[rows] @ vector
        best = np.argsort(-scores, kind="stable")[:k]
        return Found(rows[best], scores[best])


def build(rows: np.ndarray, kind: Kind) -> tuple[Any, int]:
    """Return (approximate index, breadth) for rows of shape [rows, dimension]; (None, 0) for "flat"."""
    if kind == "flat":
        return None, 0
    faiss, (count, dimension) = _faiss(), rows.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD_BREADTH
    else:
        lists = max(1, min(round(4 * count**0.5), count // TRAINING_ROWS_PER_LIST))
        quantiser = faiss.IndexFlatIP(dimension)
        if kind == "ivf-sq8":
            index = faiss.IndexIVFScalarQuantizer(
                quantiser, dimension, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
        else:
            index = faiss.IndexIVFPQ(quantiser, dimension, lists, dimension // PQ_DIMENSIONS, 8, faiss.METRIC_INNER_PRODUCT)
        drawn = np.random.default_rng(0).permutation(count)[: lists * TRAINING_ROWS_PER_LIST]
        index.train(np.ascontiguousarray(rows[np.sort(drawn)]))
    index.add(np.ascontiguousarray(rows))
    return index, _calibrated(rows, kind, index)


def read(path: Path) -> Any:
    """Return an approximate index from its FAISS file."""
    return _faiss().read_index(str(path))


def serialised(index: Any) -> bytes:
    """Return the content of a FAISS file; FAISS's own writer would hide why a write failed."""
    return cast("bytes", _faiss().serialize_index(index).tobytes())


def recall(rows: np.ndarray, found: Sequence[np.ndarray], queries: np.ndarray) -> float:
    """Return which share of the exact nearest rows was found.

    Args:
        rows: all of them, [rows, dimension].
        found: for each query the rows that were found, all equally many.
        queries: [queries, dimension].
    """
    faiss = _faiss()
    exact = faiss.knn(queries, np.ascontiguousarray(rows), len(found[0]), metric=faiss.METRIC_INNER_PRODUCT)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def sample_queries(rows: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    """Return vectors that lie about as far from a row as a question lies from its passage, shape [count, dimension]."""
    drawn = np.random.default_rng(seed)
    chosen = np.asarray(rows[np.sort(drawn.integers(0, len(rows), count))])
    noise = drawn.standard_normal(chosen.shape).astype(np.float32)
    noise -= (noise * chosen).sum(1, keepdims=True) * chosen
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return cast("np.ndarray", (SAMPLE_COSINE * chosen + (1 - SAMPLE_COSINE**2) ** 0.5 * noise).astype(np.float32))


def _calibrated(rows: np.ndarray, kind: Kind, index: Any) -> int:
    """Return the smallest breadth, of powers of two and what lies half-way, that finds `RECALL` of the neighbours."""
    queries = sample_queries(rows, SAMPLE_QUERIES)
    most = len(rows) if kind == "hnsw" else index.nlist
    breadth = 16 if kind == "hnsw" else 1
    while breadth < most:
        vectors = Vectors(rows, kind, index, breadth)
        if recall(rows, [vectors.search(q, SAMPLE_K).rows for q in queries], queries) >= RECALL:
            return breadth
        breadth = breadth * 3 // 2 if breadth & (breadth - 1) == 0 and breadth > 1 else (breadth * 4 // 3 if breadth > 1 else 2)
    return most


def _parameters(kind: Kind, breadth: int, allowed: np.ndarray | None, count: int) -> Any:
    faiss = _faiss()
    selector = {} if allowed is None else {"sel": _selector(allowed, count)}
    if kind == "flat":
        return faiss.SearchParameters(**selector) if selector else None
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=breadth, **selector)
    return faiss.SearchParametersIVF(nprobe=breadth, **selector)


def _selector(allowed: np.ndarray, count: int) -> Any:
    marked = np.zeros(count, dtype=bool)
    marked[allowed] = True
    return _faiss().IDSelectorBitmap(np.packbits(marked, bitorder="little"))


def _faiss() -> Any:
    """Return the library; it is imported late, since it takes long, and its types do not know all of it."""
    import faiss

    return faiss
