"""Question -> passages, with the seconds that embedding and search took; how they are ranked is in pipelines.rag.ranking.

The LangChain adapter at the end is for chains, our own path does not go through it.
Used by: make ask Q="Which open models allow commercial use?"
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError
from pipelines.rag.embed import Embedder
from pipelines.rag.index import MAX_K, Hit, Index, RagConfig

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever


@dataclass(frozen=True)
class Retrieved:
    """The hits, best first, and what they cost."""

    hits: tuple[Hit, ...]
    embed_seconds: float
    search_seconds: float


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

    def retrieve(self, question: str, k: int) -> Retrieved:
        """Return the `k` best passages, or all if the index has fewer.

        Raises:
            DataError: the question is blank or longer than the embedder reads, or `k` is not in 1 to `MAX_K`.
        """
        from pipelines.rag.ranking import rank

        self._check(question, k)
        started = time.perf_counter()
        vector = self.embedder.embed([question])[0] if self.config.dense_weight else None
        embedded = time.perf_counter()
        ranked = rank(self.index, self.config, question, vector, k)
        cosines = [None] * len(ranked.rows) if ranked.cosines is None else ranked.cosines.tolist()
        hits = tuple(
            self.index.hit(row, score, cosine)
            for row, score, cosine in zip(ranked.rows.tolist(), ranked.scores.tolist(), cosines, strict=True)
        )
        return Retrieved(hits, embedded - started, time.perf_counter() - embedded)

    def _check(self, question: str, k: int) -> None:
        if not 1 <= k <= MAX_K:
            raise DataError(f"{k} passages were asked for", f"a number from 1 to {MAX_K}")
        if not question.strip():
            raise DataError("the question is empty", "a question")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise DataError("the question is not valid Unicode", "text that can be written as UTF-8")
        tokens = self.embedder.token_count(question)
        if tokens > self.embedder.max_tokens:
            limit = f"at most {self.embedder.max_tokens}, since the embedder reads no more"
            raise DataError(f"the question has {tokens} tokens", limit)


def as_langchain(retriever: Retriever, k: int) -> BaseRetriever:
    """Return the retriever as a LangChain `BaseRetriever`, for use in a chain.

    Its documents carry the text, the chunk id, and `source`, `title`, `page`, `score` and `cosine` as metadata.
    """
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class LabRetriever(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return [
                Document(hit.text, id=hit.chunk_id, metadata={
                    "source": hit.source, "title": hit.title, "page": hit.page, "score": hit.score,
                    "cosine": hit.cosine,
                })
                for hit in retriever.retrieve(query, k).hits
            ]  # fmt: skip

    return LabRetriever()
