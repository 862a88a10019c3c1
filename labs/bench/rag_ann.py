"""Approximate search on made vectors, against an exact one: what it finds, and what it costs.

Run as a part of: llmlab bench rag
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from labs.bench.rag_speed import in_turns
from pipelines.config import ROOT

if TYPE_CHECKING:
    import numpy as np

    from pipelines.rag.vectors import Kind, Vectors

DIMENSION, LATENT, ROWS_PER_CLUSTER, CLUSTER_SPREAD = 384, 48, 200, 0.7
ANN_QUERIES, ANN_K = 200, 10
APPROXIMATE: tuple[Kind, ...] = ("hnsw", "ivf-sq8")

_READER = """
import faiss, psutil, sys
from pathlib import Path
from pipelines.rag.vectors import read
before = psutil.Process().memory_info().rss
index = read(Path(sys.argv[1]))
print(psutil.Process().memory_info().rss - before)
"""


def approximate(count: int) -> dict[str, dict[str, float]]:
    """Return for each kind of approximate search what it finds, and what it costs beside an exact one.

    Args:
        count: vectors of `DIMENSION` dimensions, made as those of texts lie: in clusters, and in fewer directions than they
            have dimensions.
    """
    from pipelines.rag import vectors as nearest

    rows = made_vectors(count)
    queries = nearest.sample_queries(rows, ANN_QUERIES, seed=2)
    exact = nearest.Vectors(rows, "flat")
    truth = [exact.search(query, ANN_K).rows for query in queries]
    found: dict[str, dict[str, float]] = {}
    for kind in APPROXIMATE:
        began = time.perf_counter()
        index, breadth = nearest.build(rows, kind)
        seconds = time.perf_counter() - began
        vectors, content = nearest.Vectors(rows, kind, index, breadth), nearest.serialised(index)
        hits = [set(vectors.search(query, ANN_K).rows.tolist()) for query in queries]
        share = [len(some.intersection(right.tolist())) / ANN_K for some, right in zip(hits, truth, strict=True)]
        slow, fast = in_turns([partial(_search, exact), partial(_search, vectors)], queries)
        found[kind] = {
            "recall_at_10": sum(share) / len(share), "speed_ratio_to_flat": slow / fast, "query_ms": 1000 * fast,
            "bytes_per_vector": len(content) / count, "memory_bytes": resident_bytes(content), "build_seconds": seconds,
            "breadth": float(breadth),
        }  # fmt: skip
    return found


def resident_bytes(content: bytes) -> float:
    """Return by how much the resident memory of a new process grows when it reads an approximate index from its file."""
    with NamedTemporaryFile(suffix=".faiss") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([sys.executable, "-c", _READER, file.name], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def made_vectors(count: int) -> np.ndarray:
    """Return float32 vectors of length 1, shape [count, DIMENSION], the same for the same count."""
    import numpy as np

    drawn = np.random.default_rng(count)
    directions = drawn.standard_normal((LATENT, DIMENSION)).astype(np.float32)
    centres = drawn.standard_normal((max(1, count // ROWS_PER_CLUSTER), LATENT)).astype(np.float32)
    rows = np.empty((count, DIMENSION), dtype=np.float32)
    for first in range(0, count, 50_000):
        size = min(50_000, count - first)
        near = centres[drawn.integers(0, len(centres), size)]
        part = (near + CLUSTER_SPREAD * drawn.standard_normal((size, LATENT), dtype=np.float32)) @ directions
        rows[first : first + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def _search(vectors: Vectors, query: np.ndarray) -> object:
    return vectors.search(query, ANN_K)
