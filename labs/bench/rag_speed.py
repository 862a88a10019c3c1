"""What retrieval costs, as ratios of medians that are taken in turns: ours to what it cannot do without.

Our retrieval to an embedding and a bare search, and to LangChain's FAISS store; our BM25 to rank_bm25; an embedder to MiniLM by
sentence-transformers. Run as a part of: llmlab bench rag
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

from labs.bench import rag_langchain
from labs.bench.rag_sets import Set, of_one
from pipelines.rag import embedders
from pipelines.rag.index import MAX_K
from pipelines.weights import quiet_loading

TIMED_QUESTIONS, SAMPLE_SEED = 60, 7
EMBEDDED_PASSAGES, EMBEDDED_TIMES = 96, 5
SPEED_PASSAGES = 20_000


def speed(asked: Set) -> dict[str, float]:
    """Return medians of milliseconds, and their ratios, over the same questions in turns."""
    from rank_bm25 import BM25Okapi

    from pipelines.rag.lexical import Lexical, words_of
    from pipelines.rag.vectors import Vectors

    retriever, questions = asked.retriever, [q.text for q in asked.questions[:TIMED_QUESTIONS]]
    k, stemmer = retriever.config.top_k, retriever.config.stemmer
    raw = Vectors(retriever.index.vectors.rows, "flat")
    drawn = random.Random(SAMPLE_SEED)
    sentences = [sentence for c in retriever.index.chunks for sentence in c.text.split(". ")]
    many = [". ".join(drawn.choices(sentences, k=4)) for _ in range(SPEED_PASSAGES)]
    words, other = Lexical.of(many, stemmer), BM25Okapi(words_of(many, stemmer))

    def retrieve(question: str) -> object:
        return retriever.retrieve(question, k)

    def bare(question: str) -> object:
        return raw.search(retriever.embedder.embed_questions([question])[0], k)

    def by_other(question: str) -> object:
        return other.get_scores(words_of([question], stemmer)[0])

    ways: dict[str, Callable[[str], object]] = {"raw": bare}
    if rag_langchain.is_here():
        chain = rag_langchain.faiss_search(retriever)
        ways["langchain"] = lambda question: chain(question, k)
    ours, *without = in_turns([retrieve, *ways.values()], questions)
    by_ours, by_theirs = in_turns([words.scores, by_other], questions)
    return {
        "retrieve_p50_ms": 1000 * ours,
        **{f"retrieve_ratio_to_{name}": ours / seconds for name, seconds in zip(ways, without, strict=True)},
        "bm25_ratio_to_rank_bm25": by_theirs / by_ours, "bm25_passages": float(SPEED_PASSAGES),
    }  # fmt: skip


def embedding(name: str, asked: Set) -> dict[str, float]:
    """Return what an embedder costs beside MiniLM by sentence-transformers as it comes (torch, float32), and what it finds.

    Args:
        name: of the embedder.
        asked: questions about an index, whose passages are embedded anew.
    """
    import numpy as np

    from pipelines.rag.embed import load_embedder

    reference, embedder = _by_sentence_transformers("minilm"), load_embedder(name)
    index = asked.retriever.index
    passages, questions = [c.passage for c in index.chunks], [q.text for q in asked.questions]
    timed = passages[:EMBEDDED_PASSAGES]
    slow, fast = in_turns([reference, embedder.embed], [timed] * EMBEDDED_TIMES)
    slow_one, fast_one = in_turns([reference, embedder.embed_questions], [[q] for q in questions[:TIMED_QUESTIONS]])
    vectors, gains = embedder.embed(passages), []
    for question, vector in zip(asked.questions, embedder.embed_questions(questions), strict=True):
        best = np.argsort(-(vectors @ vector), kind="stable")[:MAX_K].tolist()
        gains.append(of_one(list(dict.fromkeys(asked.key(index.chunks[row]) for row in best)), question.right)["ndcg_at_10"])
    return {
        "ratio_to_torch": slow / fast, "question_ratio_to_torch": slow_one / fast_one, "passages_per_second": len(timed) / fast,
        "question_ms": 1000 * fast_one, "ndcg_at_10": sum(gains) / len(gains),
    }  # fmt: skip


def _by_sentence_transformers(name: str) -> Callable[[list[str]], object]:
    """Return what makes vectors of texts with the weights of an embedder, by the library that defines such models."""
    from sentence_transformers import SentenceTransformer

    with quiet_loading():
        model = SentenceTransformer(str(embedders.folder_of(embedders.find(name))), device="cpu", local_files_only=True)
    return partial(model.encode, show_progress_bar=False)


def in_turns(ways: Sequence[Callable[[Any], object]], asked: Iterable[Any]) -> list[float]:
    """Return the median seconds of each way; each question is asked of all before the next."""
    taken: list[list[float]] = [[] for _ in ways]
    for question in asked:
        for way, seconds in zip(ways, taken, strict=True):
            began = time.perf_counter()
            way(question)
            seconds.append(time.perf_counter() - began)
    return [median(seconds) for seconds in taken]
