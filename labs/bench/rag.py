"""Retrieval measured in one run: `llmlab bench rag`.

Quality on question sets whose right passages are known: XQuAD (labs.bench.xquad; a passage is right if it is a piece of the
question's paragraph) and the knowledge base (a passage is right if it states the fact). Speed as ratios: our retrieval to
what it cannot do without, our BM25 to rank_bm25, a sync after a small change to the first one. Approximate search on made
vectors, against an exact one. Indexes are made in a temporary folder; nothing of the user's is touched.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from labs.bench import xquad
from pipelines.config import load, named
from pipelines.errors import ConfigError
from pipelines.rag import embedders
from pipelines.rag.index import MAX_K, RagConfig

if TYPE_CHECKING:
    import numpy as np

    from pipelines.rag.chunk import Chunk
    from pipelines.rag.retrieve import Retriever
    from pipelines.rag.vectors import Kind, Vectors

METHODS: dict[str, float | None] = {
    "bm25": 0.0,
    "dense": 1.0,
    "hybrid": None,
}  # weight of the vectors; None is that of the configuration
CUTS = (1, 5, 10)
TIMED_QUESTIONS, EMBEDDED_PASSAGES, SAMPLE_SEED = 60, 96, 7
CHANGED_SHARE = 0.01
QUICK_VECTORS, FULL_VECTORS = (200_000,), (200_000, 1_000_000)
DIMENSION, LATENT, ROWS_PER_CLUSTER, CLUSTER_SPREAD = 384, 48, 200, 0.7
ANN_QUERIES, ANN_K = 200, 10
APPROXIMATE: tuple[Kind, ...] = ("hnsw", "ivf-sq8")
SPEED_PASSAGES = 20_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """A question and what is right: names that `Set.key` gives to chunks."""

    text: str
    right: frozenset[str]


@dataclass(frozen=True)
class Set:
    """Questions about the documents of one index."""

    name: str
    retriever: Retriever
    questions: tuple[Asked, ...]
    key: Callable[[Chunk], str]


def bench_rag(vector_counts: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Return the document of a run.

    Args:
        vector_counts: sizes of the approximate search.
        progress: is told (stage, done, total).

    Raises:
        ConfigError: rank_bm25 is not installed.
        DataError: the XQuAD file is absent.
    """
    from pipelines.hardware import use_all_cores

    if find_spec("rank_bm25") is None:
        raise ConfigError("rank_bm25 is not installed", "what search by words is compared with", "make bench-rag")
    use_all_cores()
    with _own_indexes() as folder:
        retriever, first_seconds, again_seconds = _xquad_index(folder, progress)
        sets = [*_xquad_sets(retriever), _knowledge_set(progress)]
        quality = {}
        for done, asked in enumerate(sets):
            progress("questions", done, len(sets))
            quality[asked.name] = {method: scores(asked, weight) for method, weight in METHODS.items()}
        progress("questions", len(sets), len(sets))
        document: dict[str, Any] = {
            "recall": quality, "hybrid_worst_gap": _worst_gap(quality), "hybrid_mean_gain": _mean_gain(quality),
            "reindex_one_percent_ratio": again_seconds / first_seconds, **speed(sets[0]),
            "embedders": {name: embedding(name, sets[1]) for name in embedders.here()},
        }  # fmt: skip
    document["ann"] = {}
    for done, count in enumerate(vector_counts):
        progress("vectors", done, len(vector_counts))
        document["ann"][str(count)] = approximate(count)
    progress("vectors", len(vector_counts), len(vector_counts))
    return document


def scores(asked: Set, dense_weight: float | None) -> dict[str, float]:
    """Return recall at `CUTS`, MRR and nDCG at 10 over the questions of a set.

    Args:
        asked: the set.
        dense_weight: of the vectors; None takes the set's own configuration.
    """
    from pipelines.rag.ranking import rank

    index, config = asked.retriever.index, asked.retriever.config
    if dense_weight is not None:
        config = config.model_copy(update={"dense_weight": dense_weight})
    vectors = asked.retriever.embedder.embed_questions([q.text for q in asked.questions])
    total = dict.fromkeys([*(f"recall_at_{cut}" for cut in CUTS), "mrr", "ndcg_at_10"], 0.0)
    for question, vector in zip(asked.questions, vectors, strict=True):
        rows = rank(index, config, question.text, vector, MAX_K).rows.tolist()
        found = list(dict.fromkeys(asked.key(index.chunks[row]) for row in rows))
        for name, value in _of_one(found, question.right).items():
            total[name] += value / len(asked.questions)
    return total


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

    ours, without = _in_turns([retrieve, bare], questions)
    by_ours, by_theirs = _in_turns([words.scores, by_other], questions)
    return {
        "retrieve_p50_ms": 1000 * ours, "retrieve_ratio_to_raw": ours / without,
        "bm25_ratio_to_rank_bm25": by_theirs / by_ours, "bm25_passages": float(SPEED_PASSAGES),
    }  # fmt: skip


def embedding(name: str, asked: Set) -> dict[str, float]:
    """Return what an embedder costs beside MiniLM by torch, 32 texts at once as sentence-transformers does, and what it finds.

    Args:
        name: of the embedder.
        asked: questions about an index, whose passages are embedded anew.
    """
    import numpy as np

    from pipelines.rag.embed import Transformer, load_embedder

    minilm = embedders.find("minilm")
    reference, embedder = Transformer(minilm, embedders.folder_of(minilm)), load_embedder(name)
    reference.texts_at_once = 32
    index = asked.retriever.index
    passages, questions = [c.passage for c in index.chunks], [q.text for q in asked.questions]
    timed = passages[:EMBEDDED_PASSAGES]
    slow, fast = _in_turns([reference.embed, embedder.embed], [timed] * 3)
    asking, single = [reference.embed_questions, embedder.embed_questions], [[q] for q in questions[:TIMED_QUESTIONS]]
    slow_one, fast_one = _in_turns(asking, single)
    vectors, gains = embedder.embed(passages), []
    for question, vector in zip(asked.questions, embedder.embed_questions(questions), strict=True):
        best = np.argsort(-(vectors @ vector), kind="stable")[:MAX_K].tolist()
        gains.append(_of_one(list(dict.fromkeys(asked.key(index.chunks[row]) for row in best)), question.right)["ndcg_at_10"])
    return {
        "ratio_to_torch": slow / fast, "question_ratio_to_torch": slow_one / fast_one, "passages_per_second": len(timed) / fast,
        "question_ms": 1000 * fast_one, "ndcg_at_10": sum(gains) / len(gains),
    }  # fmt: skip


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
        vectors = nearest.Vectors(rows, kind, index, breadth)
        size = len(nearest.serialised(index))
        hits = [set(vectors.search(query, ANN_K).rows.tolist()) for query in queries]
        share = [len(some.intersection(right.tolist())) / ANN_K for some, right in zip(hits, truth, strict=True)]
        slow, fast = _in_turns([partial(_search, exact), partial(_search, vectors)], queries)
        found[kind] = {
            "recall_at_10": sum(share) / len(share), "speed_ratio_to_flat": slow / fast, "query_ms": 1000 * fast,
            "bytes_per_vector": size / count, "build_seconds": seconds, "breadth": float(breadth),
        }  # fmt: skip
    return found


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


def _of_one(found: Sequence[str], right: frozenset[str]) -> dict[str, float]:
    """Return the scores of one ranking; recall is whether any right name is among the first."""
    first = next((place for place, name in enumerate(found) if name in right), None)
    gain = sum(1 / math.log2(place + 2) for place, name in enumerate(found[:10]) if name in right)
    best = sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))
    cuts = {f"recall_at_{cut}": float(first is not None and first < cut) for cut in CUTS}
    return {**cuts, "mrr": 0.0 if first is None else 1 / (first + 1), "ndcg_at_10": gain / best}


def _worst_gap(quality: dict[str, dict[str, dict[str, float]]]) -> float:
    """Return by how much hybrid search stays behind the better of its legs, on the set and score where that is worst."""
    return max(max(of["bm25"][name], of["dense"][name]) - of["hybrid"][name] for of in quality.values() for name in of["hybrid"])


def _mean_gain(quality: dict[str, dict[str, dict[str, float]]]) -> float:
    gains = [of["hybrid"][name] - max(of["bm25"][name], of["dense"][name]) for of in quality.values() for name in of["hybrid"]]
    return sum(gains) / len(gains)


def _in_turns(ways: Sequence[Callable[[Any], object]], asked: Iterable[Any]) -> list[float]:
    """Return the median seconds of each way; each question is asked of all before the next."""
    taken: list[list[float]] = [[] for _ in ways]
    for question in asked:
        for way, seconds in zip(ways, taken, strict=True):
            began = time.perf_counter()
            way(question)
            seconds.append(time.perf_counter() - began)
    return [median(seconds) for seconds in taken]


def _search(vectors: Vectors, query: np.ndarray) -> object:
    return vectors.search(query, ANN_K)


@contextmanager
def _own_indexes() -> Iterator[Path]:
    before = os.environ.get("LLMLAB_INDEX")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMLAB_INDEX"] = str(Path(folder) / "index")
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["LLMLAB_INDEX"]
            else:
                os.environ["LLMLAB_INDEX"] = before


def _xquad_index(folder: Path, progress: Progress) -> tuple[Retriever, float, float]:
    """Return a retriever over all paragraphs, and the seconds of the first sync and of one after a small change."""
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import open_index, sync
    from pipelines.rag.retrieve import Retriever

    docs = folder / "xquad"
    docs.mkdir()
    paragraphs = xquad.paragraphs()
    for name, paragraph in paragraphs.items():
        (docs / f"{name}.txt").write_text(paragraph[0].paragraph, encoding="utf-8")
    config = load(named("rag", "default"), RagConfig)
    embedder = load_embedder(config.embedder)
    embedder.embed(["The first text takes longer."])
    first = sync(docs, "xquad", config, embedder, progress).seconds
    retriever = Retriever(open_index("xquad", embedder), embedder, config)
    for name in list(paragraphs)[: math.ceil(CHANGED_SHARE * len(paragraphs))]:
        (docs / f"{name}.txt").write_text(paragraphs[name][0].paragraph + " It ends here.", encoding="utf-8")
    return retriever, first, sync(docs, "xquad", config, embedder, progress).seconds


def _xquad_sets(retriever: Retriever) -> Iterator[Set]:
    paragraphs, tested = xquad.paragraphs(), {q.id for q in xquad.test_questions(None)}
    for name, test in (("xquad_train", False), ("xquad_test", True)):
        asked = tuple(Asked(q.question, frozenset({f"{paragraph}.txt"})) for paragraph, questions in paragraphs.items()
                      for q in questions if (q.id in tested) == test)  # fmt: skip
        yield Set(name, retriever, asked, lambda chunk: chunk.source)


def _knowledge_set(progress: Progress) -> Set:
    from pipelines.catalogue import all_models
    from pipelines.tune.data import corpora, holding, load_reader, questions_about

    progress("knowledge base", 0, 1)
    config = load_reader()
    _, whole = corpora(config)
    chunks = whole.retriever.index.chunks
    asked = []
    for model in all_models():
        for question in questions_about(model, config):
            right = frozenset(chunks[whole.rows[place]].id for place in holding(whole, question))
            if right:
                asked.append(Asked(question.text, right))
    progress("knowledge base", 1, 1)
    return Set("knowledge", whole.retriever, tuple(asked), lambda chunk: chunk.id)
