"""Question -> passages, with the seconds that embedding and search took; how they are ranked is in pipelines.rag.ranking.

For chains of other libraries see pipelines.rag.adapters.
Used by: make ask Q="Which open models allow commercial use?"
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import DataError
from pipelines.rag.embed import Embedder
from pipelines.rag.index import MAX_K, Hit, Index, RagConfig
from pipelines.rag.screen import reason_to_hold_back

if TYPE_CHECKING:
    from pipelines.rag.ranking import Ranked


@dataclass(frozen=True)
class Retrieved:
    """What was found, and what it cost.

    Attributes:
        hits: best first.
        held_back: passages that would have been hits, and why they are not (pipelines.rag.screen).
        retriever: that found it; another generation may serve by now.
    """

    hits: tuple[Hit, ...]
    held_back: tuple[tuple[Hit, str], ...]
    embed_seconds: float
    search_seconds: float
    retriever: Retriever


@dataclass(frozen=True)
class Retriever:
    """An open index and the embedder it was made with; safe to use from several threads.

    Attributes:
        index: what is searched.
        embedder: makes the vector of a question.
        config: how vectors and words are weighed.
    """

    index: Index
    embedder: Embedder
    config: RagConfig

    def retrieve(self, question: str, k: int, where: str | None = None) -> Retrieved:
        """Return the `k` best passages, or all if the index has fewer.

        Args:
            question: what is asked.
            k: at most `MAX_K`.
            where: which chunks are searched, all if None; an expression of pipelines.rag.where.

        Raises:
            DataError: the question is blank or longer than the embedder reads, `k` is not in 1 to `MAX_K`, or the expression
                cannot be read.
        """
        from pipelines.rag.ranking import rank

        self._check(question, k)
        allowed = None if where is None else self.index.rows_where(where)
        started = time.perf_counter()
        vector = self.embedder.embed_questions([question])[0] if self.config.dense_weight else None
        embedded = time.perf_counter()
        wanted = k
        while True:
            hits, held_back = self._screened(rank(self.index, self.config, question, vector, wanted, allowed, where))
            if len(hits) >= k or wanted >= len(self.index if allowed is None else allowed):
                break
            wanted = k + len(held_back)
        return Retrieved(tuple(hits[:k]), tuple(held_back), embedded - started, time.perf_counter() - embedded, self)

    def _screened(self, ranked: Ranked) -> tuple[list[Hit], list[tuple[Hit, str]]]:
        cosines = [None] * len(ranked.rows) if ranked.cosines is None else ranked.cosines.tolist()
        hits, held_back = [], []
        for row, score, cosine in zip(ranked.rows.tolist(), ranked.scores.tolist(), cosines, strict=True):
            hit = self.index.hit(row, score, cosine)
            reason = reason_to_hold_back(f"{hit.title} {hit.text}") if self.config.screen else None
            if reason:
                held_back.append((hit, reason))
            else:
                hits.append(hit)
        return hits, held_back

    def _check(self, question: str, k: int) -> None:
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
