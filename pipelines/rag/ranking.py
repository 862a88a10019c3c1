"""The order of chunks for a question: by their vectors and by their words together.

Each kind of search proposes its best candidates; both scores of every candidate are then put in proportion to the best of
their kind and added up with a weight (Bruch et al. 2022, arXiv 2210.11934).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from pipelines.rag.index import Index, RagConfig


@dataclass(frozen=True)
class Ranked:
    """Chunks in the order of their scores: rows of the index, scores, and cosines (None if no vector was asked)."""

    rows: np.ndarray
    scores: np.ndarray
    cosines: np.ndarray | None


def rank(
    index: Index, config: RagConfig, question: str, vector: np.ndarray | None, k: int, allowed: np.ndarray | None = None,
    where: str | None = None,
) -> Ranked:  # fmt: skip
    """Return the `k` best chunks for a question, or all that there are.

    Args:
        index: what is searched.
        config: how vectors and words are weighed.
        question: for the words.
        vector: of the question, shape [dimension]; may be None if only words count.
        k: at least 1.
        allowed: sorted rows; only they are searched.
        where: the expression that allows them, for a store.
    """
    if config.dense_weight == 1:
        assert vector is not None
        found = index.nearest(vector, k, allowed, where)
        return Ranked(found.rows, found.scores, found.scores)
    words = index.words.scores(question)
    within = np.arange(len(index)) if allowed is None else allowed
    wanted = min(max(k, config.candidates), len(within))
    rows = within[_largest(words[within], wanted)]
    if config.dense_weight == 0:
        return Ranked(rows[:k], words[rows[:k]], None)
    assert vector is not None
    rows = np.union1d(rows, index.nearest(vector, wanted, allowed, where).rows)
    cosines = index.vectors.rows[rows] @ vector
    scores = config.dense_weight * _in_proportion(cosines) + (1 - config.dense_weight) * _in_proportion(words[rows])
    best = np.argsort(-scores, kind="stable")[:k]
    return Ranked(rows[best], scores[best], cosines[best])


def _in_proportion(scores: np.ndarray) -> np.ndarray:
    """Return scores as shares of the largest; none is worth less than nothing."""
    largest = scores.max(initial=0.0)
    return cast("np.ndarray", np.maximum(scores, 0) / largest if largest > 0 else np.zeros_like(scores))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the `count` largest scores, the largest first."""
    places = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")]
