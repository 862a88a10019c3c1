"""The order of chunks for a question: by their vectors and by their words together.

Each kind of search proposes its best candidates. Both scores of every candidate become standard scores among those of their
kind and are added up with a weight, so that a kind counts for more where its best stands out (Bruch et al. 2022, arXiv
2210.11934, compare ways to do it; shares of the best of a kind were worse here, where one kind knows much more than the other).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from pipelines.rag.index import Index, RagConfig

FUSION = "standard scores"  # how words and vectors are put together; what was learned with another way holds no more
LEAST_SPREAD = 1e-6  # of scores that are not all alike but for rounding


@dataclass(frozen=True)
class Ranked:
    """Chunks in the order of their scores: rows of the index, scores, and cosines (None if no vector was asked)."""

    rows: np.ndarray
    scores: np.ndarray
    cosines: np.ndarray | None

    def __iter__(self) -> Iterator[tuple[int, float, float | None]]:
        """Yield row, score and cosine, the best first."""
        cosines = [None] * len(self.rows) if self.cosines is None else self.cosines.tolist()
        yield from zip(self.rows.tolist(), self.scores.tolist(), cosines, strict=True)

    def sorted_by(self, scores: np.ndarray) -> Ranked:
        """Return the same chunks in the order of other scores, which become theirs."""
        order = np.argsort(-scores, kind="stable")
        return Ranked(self.rows[order], scores[order], None if self.cosines is None else self.cosines[order])


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
    added = config.dense_weight * _standard(cosines) + (1 - config.dense_weight) * _standard(words[rows])
    scores = 1 / (1 + np.exp(-added))  # 0..1, in the same order
    best = np.argsort(-scores, kind="stable")[:k]
    return Ranked(rows[best], scores[best], cosines[best])


def joined(rankings: Sequence[Ranked]) -> Ranked:
    """Return every chunk of several rankings with its best score and its best cosine."""
    rows = np.unique(np.concatenate([ranked.rows for ranked in rankings]))
    scores, cosines = np.full(len(rows), -np.inf), np.full(len(rows), -1.0)
    for ranked in rankings:
        places = np.searchsorted(rows, ranked.rows)
        scores[places] = np.maximum(scores[places], ranked.scores)
        if ranked.cosines is not None:
            cosines[places] = np.maximum(cosines[places], ranked.cosines)
    return Ranked(rows, scores, None if rankings[0].cosines is None else cosines).sorted_by(scores)


def diversified(scores: Sequence[float], vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    """Return places of `k` candidates, each chosen for its score and against its likeness to those before it.

    Maximal marginal relevance (Carbonell & Goldstein 1998): (1 - diversity) * score - diversity * largest cosine to a chosen one.

    Args:
        scores: of the candidates, the best first; each counts as its share of the best.
        vectors: of length 1, [candidates, dimension].
        k: at least 1; fewer if there are fewer.
        diversity: 0 keeps the order, 1 looks at likeness only.
    """
    chosen: list[int] = []
    best_score = max(0.0, *scores) or 1.0 if scores else 1.0
    left, likeness = list(range(len(scores))), np.zeros(len(scores))
    while left and len(chosen) < k:
        best = max(left, key=lambda place: (1 - diversity) * scores[place] / best_score - diversity * likeness[place])
        left.remove(best)
        chosen.append(best)
        likeness = np.maximum(likeness, vectors @ vectors[best])
    return chosen


def _standard(scores: np.ndarray) -> np.ndarray:
    """Return how many standard deviations each score is from their mean; zeros where all are alike."""
    spread = scores.std() if len(scores) else 0.0
    return cast("np.ndarray", (scores - scores.mean()) / spread if spread > LEAST_SPREAD else np.zeros_like(scores))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the `count` largest scores, the largest first."""
    places = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")]
