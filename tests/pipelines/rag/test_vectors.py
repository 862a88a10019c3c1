"""Nearest vectors: exact where it says so, nearly exact otherwise, and always as many as are allowed."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from pipelines.rag import vectors
from pipelines.rag.vectors import Kind, Vectors, build, choose, recall, sample_queries

MB = 1_000_000


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Vectors in clusters, as texts about some subjects are."""
    drawn = np.random.default_rng(0)
    centres = drawn.standard_normal((60, 32))
    made = (centres[drawn.integers(0, 60, 6000)] + 0.6 * drawn.standard_normal((6000, 32))).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def made(rows: np.ndarray, kind: Kind) -> Vectors:
    return Vectors(rows, kind, *build(rows, kind))


@pytest.mark.parametrize("kind", vectors.KINDS)
def test_neighbours_are_found(kind: Kind, rows: np.ndarray, tmp_path: Path) -> None:
    index, breadth = build(rows, kind)
    found = Vectors(rows, kind, index, breadth)
    queries = sample_queries(rows, 200, seed=5)
    share = recall(rows, [found.search(q, 10).rows for q in queries], queries)
    assert share == 1 if kind == "flat" else share >= 0.95
    for query in queries[:20]:
        hits = found.search(query, 10)
        np.testing.assert_allclose(hits.scores, rows[hits.rows] @ query, atol=1e-6)
        assert (np.diff(hits.scores) <= 0).all()
    if index is not None:
        (tmp_path / "index.faiss").write_bytes(vectors.serialised(index))
        again = Vectors(rows, kind, vectors.read(tmp_path / "index.faiss"), breadth)
        assert [again.search(q, 10).rows.tolist() for q in queries] == [found.search(q, 10).rows.tolist() for q in queries]


@pytest.mark.parametrize("kind", vectors.KINDS)
@pytest.mark.parametrize("share", [0.0, 0.0002, 0.01, 0.75, 0.999])
def test_there_are_k_whenever_k_are_allowed(kind: Kind, share: float, rows: np.ndarray) -> None:
    found = made(rows, kind)
    allowed = np.flatnonzero(np.random.default_rng(3).random(len(rows)) < share)
    for query in sample_queries(rows, 5, seed=9):
        for k in (1, 10, 50):
            hits = found.search(query, k, allowed).rows
            assert len(hits) == len(set(hits.tolist())) == min(k, len(allowed)) and np.isin(hits, allowed).all()
            if kind == "flat" or len(allowed) <= vectors.GATHER_ROWS:
                exact = allowed[np.argsort(-(rows[allowed] @ query), kind="stable")[:k]]
                assert hits.tolist() == exact.tolist()


def test_allowed_rows_far_from_the_question_are_found_in_an_approximate_index(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that looks at a few near lists holds none of them; the search must not end empty-handed."""
    monkeypatch.setattr(vectors, "GATHER_ROWS", 0)
    query = rows[0]
    allowed = np.sort(np.argsort(rows @ query)[:30])
    for kind in vectors.KINDS:
        assert len(made(rows, kind).search(query, 20, allowed).rows) == 20


def test_the_kind_follows_from_size_and_memory() -> None:
    assert choose(1000, 384, 4000 * MB).kind == "flat"
    assert choose(200_000, 384, 4000 * MB).kind == "hnsw"
    assert choose(200_000, 384, 100 * MB).kind == "ivf-sq8"
    assert choose(200_000, 384, 30 * MB) == ("ivf-pq", "200000 vectors take 21 MB so, and 30 MB are allowed")
    assert choose(50_000, 384, 10 * MB).kind == "ivf-pq"
    assert choose(200_000, 384, 1 * MB, "hnsw") == ("hnsw", "asked for by name")
    assert choose(999, 384, 1 * MB, "ivf-pq") == ("flat", "999 vectors are too few for anything else")


@pytest.mark.parametrize("kind", vectors.KINDS)
def test_a_row_takes_about_as_much_memory_as_is_said(kind: Kind, rows: np.ndarray) -> None:
    index, _ = build(rows, kind)
    if index is None:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
    fixed = 0 if kind in ("flat", "hnsw") else index.nlist * rows.shape[1] * 4 + 40_000
    assert (len(vectors.serialised(index)) - fixed) / len(rows) == pytest.approx(vectors.bytes_per_row(kind, 32), rel=0.25)


@pytest.mark.parametrize("kind", vectors.KINDS)
def test_the_fewest_rows_are_enough_for_every_kind(kind: Kind, rows: np.ndarray) -> None:
    assert made(rows[: vectors.FEWEST_APPROXIMATE_ROWS], kind).search(rows[0], 5).rows[0] == 0
