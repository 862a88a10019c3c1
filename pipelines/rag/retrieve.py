"""Question -> passages, with the seconds that embedding and search took; how they are ranked is in pipelines.rag.ranking.

For chains of other libraries see pipelines.rag.adapters.
Used by: make ask Q="Which open models allow commercial use?"
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from pipelines.errors import DataError
from pipelines.rag.abstention import LOOKED_AT, kept, sign
from pipelines.rag.context import joined_text, widened
from pipelines.rag.embed import Embedder
from pipelines.rag.index import MAX_K, Hit, Index, RagConfig, open_index
from pipelines.rag.parts import parts
from pipelines.rag.screen import reason_to_hold_back

if TYPE_CHECKING:
    import numpy as np

    from pipelines.rag.ranking import Ranked
    from pipelines.rag.rerank import Reranker


@dataclass(frozen=True)
class Retrieved:
    """What was found, and what it cost.

    Attributes:
        hits: best first.
        held_back: passages that would have been hits, and why they are not (pipelines.rag.screen).
        sign: how much speaks for an answer in them (pipelines.rag.abstention), 0..1.
        answerable: False if the sign is below the threshold of the index.
        retriever: that found it; another generation may serve by now.
    """

    hits: tuple[Hit, ...]
    held_back: tuple[tuple[Hit, str], ...]
    sign: float
    answerable: bool
    embed_seconds: float
    search_seconds: float
    retriever: Retriever


@dataclass(frozen=True)
class Retriever:
    """An open index and the embedder it was made with; safe to use from several threads.

    Attributes:
        index: what is searched.
        embedder: makes the vector of a question.
        config: how vectors and words are weighed, and what is done with the best candidates.
        reranker: puts them in a better order; None leaves them as they are.
        threshold: of the sign below which a question has no answer here; None takes every question.
    """

    index: Index
    embedder: Embedder
    config: RagConfig
    reranker: Reranker | None = None
    threshold: float | None = None

    def retrieve(self, question: str, k: int, where: str | None = None) -> Retrieved:
        """Return the `k` best passages, or all if the index has fewer; widened ones that overlap become fewer.

        Args:
            question: what is asked.
            k: at most `MAX_K`.
            where: which chunks are searched, all if None; an expression of pipelines.rag.where.

        Raises:
            DataError: the question is blank or longer than the embedder reads, `k` is not in 1 to `MAX_K`, or the expression
                cannot be read.
        """
        from pipelines.rag.ranking import rank

        self.check(question, k)
        allowed = None if where is None else self.index.rows_where(where)
        started = time.perf_counter()
        texts = [question, *(parts(question) if self.config.split_questions else ())]
        vectors = self.embedder.embed_questions(texts) if self.config.dense_weight else [None] * len(texts)
        embedded = time.perf_counter()
        depth = max(k, LOOKED_AT, self.config.rerank_candidates if self.reranker or self.config.diversity else 0)
        while True:
            rankings = [rank(self.index, self.config, text, vector, depth, allowed, where)
                        for text, vector in zip(texts, vectors, strict=True)]  # fmt: skip
            hits, held_back = self._chosen(self._in_order(texts, rankings), k)
            if len(hits) >= k or depth >= len(self.index if allowed is None else allowed):
                break
            depth *= 2
        told = self._sign(question, rankings[0])
        if self.config.neighbours:
            hits = widened(hits, self.index, self.config.neighbours, partial(self._may_be_shown, allowed))
        return Retrieved(tuple(hits), tuple(held_back), told, self.threshold is None or told >= self.threshold,
                         embedded - started, time.perf_counter() - embedded, self)  # fmt: skip

    def check(self, question: str, k: int) -> None:
        """Raise `DataError` for what `retrieve` refuses."""
        if not 1 <= k <= MAX_K:
            raise DataError(f"{k} passages were asked for", f"a number from 1 to {MAX_K}")
        if not question.strip():
            raise DataError("the question is empty", "a question")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise DataError("the question is not valid Unicode", "text that can be written as UTF-8")
        tokens = self.embedder.token_count(question, question=True)
        if tokens > self.embedder.max_tokens:
            limit = f"at most {self.embedder.max_tokens}, since the embedder reads no more"
            raise DataError(f"the question has {tokens} tokens", limit)

    def sign(self, question: str, allowed: np.ndarray | None = None) -> float:
        """Return how much speaks for an answer, 0..1, among all chunks or those of some rows (sorted)."""
        from pipelines.rag.ranking import rank

        vector = self.embedder.embed_questions([question])[0] if self.config.dense_weight else None
        return self._sign(question, rank(self.index, self.config, question, vector, MAX_K, allowed))

    def reranked(self, question: str, ranked: Ranked) -> Ranked:
        """Return a ranking after the reranker has read its best candidates; as it is if there is none."""
        import numpy as np

        from pipelines.rag.rerank import blended

        if self.reranker is None:
            return ranked
        passages = [self.index.chunks[row].passage for row in ranked.rows[: self.config.rerank_candidates].tolist()]
        told = np.zeros(len(ranked.rows), dtype=np.float32)
        told[: len(passages)] = self.reranker.scores(question, passages, self.index.words)
        return ranked.sorted_by(blended(ranked.scores, told, self.config.rerank_weight))

    def _in_order(self, texts: Sequence[str], rankings: Sequence[Ranked]) -> Ranked:
        """Return one ranking for a question and its parts."""
        from pipelines.rag.ranking import joined

        reranked = [self.reranked(text, ranked) for text, ranked in zip(texts, rankings, strict=True)]
        return reranked[0] if len(reranked) == 1 else joined(reranked)

    def _sign(self, question: str, ranked: Ranked) -> float:
        """Return the sign of the best passages that are not held back."""
        told = (one for one in ranked if self._reason_of([one[0]]) is None)
        best = list(islice(told, LOOKED_AT))
        return sign(self.index, question, [row for row, _, _ in best], [cosine for _, _, cosine in best if cosine is not None])

    def _chosen(self, ranked: Ranked, k: int) -> tuple[list[Hit], list[tuple[Hit, str]]]:
        """Return the hits, and what stands before the last of them and is held back."""
        from pipelines.rag.ranking import diversified

        hits, held_back = [], []
        for row, score, cosine in ranked:
            hit = self.index.hit(row, score, cosine)
            reason = self._reason_of([row])
            if reason:
                held_back.append((hit, reason))
            else:
                hits.append(hit)
            if len(hits) == k and not self.config.diversity:
                break
        if self.config.diversity:
            rows = [hit.row for hit in hits]
            hits = [hits[place] for place in diversified([hit.score for hit in hits], self.index.vectors.rows[rows], k,
                                                         self.config.diversity)]  # fmt: skip
            worst = min((hit.score for hit in hits), default=0.0)
            held_back = [(hit, reason) for hit, reason in held_back if hit.score >= worst]
        return hits, held_back

    def _may_be_shown(self, allowed: np.ndarray | None, rows: Sequence[int]) -> bool:
        return (allowed is None or all(row in allowed for row in rows)) and self._reason_of(rows) is None

    def _reason_of(self, rows: Sequence[int]) -> str | None:
        """Return why some chunks of one heading, read as one text, are held back; None if they are not."""
        text = f"{self.index.chunks[rows[0]].title} {joined_text(self.index, rows)}"
        return reason_to_hold_back(text) if self.config.screen else None


def open_retriever(name: str, embedder: Embedder, config: RagConfig, reranker: Reranker | None = None) -> Retriever:
    """Open an index with what its configuration asks for.

    Args:
        name: of the index.
        embedder: that it was made with.
        config: how it is searched.
        reranker: one that is loaded already; None loads what the configuration names.

    Raises:
        UnknownName: there is no such index or reranker.
        WeightsMissing: those of the reranker are not on this machine.
        LabError: as pipelines.rag.index.open_index.
    """
    from pipelines.rag.rerank import load_reranker

    index = open_index(name, embedder, config.store)
    threshold = kept(index, config)
    return Retriever(index, embedder, config, reranker or load_reranker(config.reranker), threshold.value if threshold else None)
