"""LangChain's FAISS store over the passages of an index, to be timed beside our own retrieval; nothing is loaded from disk.

Run as a part of: llmlab bench rag
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec

from pipelines.rag.retrieve import Retriever


def is_here() -> bool:
    """Return True if LangChain's FAISS store is installed."""
    return find_spec("langchain_community") is not None


def faiss_search(retriever: Retriever) -> Callable[[str, int], list[str]]:
    """Return what finds the texts of the nearest passages for a question: the same embedder, vectors and passages as ours."""
    from langchain_core.embeddings import Embeddings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package says that nobody maintains it any more
        from langchain_community.vectorstores import FAISS
        from langchain_community.vectorstores.utils import DistanceStrategy

    class Ours(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            vectors: list[list[float]] = retriever.embedder.embed(texts).tolist()
            return vectors

        def embed_query(self, text: str) -> list[float]:
            vector: list[float] = retriever.embedder.embed_questions([text])[0].tolist()
            return vector

    index = retriever.index
    pairs = [(c.passage, row.tolist()) for c, row in zip(index.chunks, index.vectors.rows, strict=True)]
    store = FAISS.from_embeddings(pairs, Ours(), distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT)
    return lambda question, k: [document.page_content for document in store.similarity_search(question, k)]
