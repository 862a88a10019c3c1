"""Retrieval measured in one run: `llmlab bench rag`.

    labs.bench.rag_sets       question sets whose right passages are known, and the scores of a search on them
    labs.bench.rag_corpus     a big corpus of real pages, with questions from labs.bench.rag_questions
    labs.bench.rag_options    what the options of retrieval bring
    labs.bench.rag_speed      what an answer costs, as ratios to what it cannot do without, and what an embedder costs
    labs.bench.rag_ann        approximate search on made vectors, against an exact one

Here is what is measured in which order, and the document that comes of it. Indexes are made in a temporary folder, that of the
big corpus in the project's cache; nothing of the user's is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from labs.bench import rag_langchain
from labs.bench.rag_ann import approximate
from labs.bench.rag_corpus import GET_THEM, cache_folder, read_corpus
from labs.bench.rag_options import options
from labs.bench.rag_questions import KINDS
from labs.bench.rag_sets import indexes_in, knowledge_set, scores, xquad_index, xquad_sets
from labs.bench.rag_speed import embedding, speed
from pipelines.errors import ConfigError
from pipelines.rag import embedders
from pipelines.rag.rerank import load_reranker

LEGS: dict[str, float | None] = {"bm25": 0.0, "dense": 1.0, "hybrid": None}  # weight of the vectors; None as configured
RERANKER = "maxsim"
CHOSEN_ON = ("_train", "_dev")  # questions that weights were chosen on; a reranker reads the others
QUICK_VECTORS, FULL_VECTORS = (200_000,), (200_000, 1_000_000)

Progress = Callable[[str, int, int], None]


def bench_rag(vector_counts: Sequence[int], corpus: Path | None, corpus_embedder: str, progress: Progress) -> dict[str, Any]:
    """Return the document of a run; `left_out` in it says what was not measured, and how it would be.

    Args:
        vector_counts: sizes of the approximate search.
        corpus: holds the packages of labs.bench.rag_corpus; None leaves them out.
        corpus_embedder: makes the vectors of the corpus.
        progress: is told (stage, done, total).

    Raises:
        ConfigError: rank_bm25 is not installed.
        DataError: the XQuAD file is absent.
    """
    from pipelines.hardware import use_all_cores

    if find_spec("rank_bm25") is None:
        raise ConfigError("rank_bm25 is not installed", "what search by words is compared with", "make bench-rag")
    use_all_cores()
    reranker = load_reranker(RERANKER)
    pages = read_corpus(corpus, cache_folder(), corpus_embedder, progress) if corpus else None
    with TemporaryDirectory() as folder, indexes_in(Path(folder) / "index"):
        retriever, first_seconds, again_seconds = xquad_index(Path(folder), progress)
        sets = [*xquad_sets(retriever), knowledge_set(progress), *(pages.sets if pages else ())]
        quality = {}
        for done, asked in enumerate(sets):
            progress("questions", done, len(sets))
            quality[asked.name] = {method: scores(asked, weight) for method, weight in LEGS.items()}
            if not asked.name.endswith(CHOSEN_ON):
                quality[asked.name]["rerank"] = scores(asked, None, reranker)
        progress("questions", len(sets), len(sets))
        document: dict[str, Any] = {
            "recall": quality, "hybrid_worst_gap": _worst_gap(quality), "hybrid_mean_gain": _mean_gain(quality),
            "rerank_recall_at_1": {name: of["rerank"]["recall_at_1"] for name, of in quality.items() if "rerank" in of},
            "options": options(sets[1]), "reindex_one_percent_ratio": again_seconds / first_seconds, **speed(sets[0]),
            "embedders": {name: embedding(name, sets[1]) for name in embedders.here()},
            "corpus": pages.facts if pages else {}, "left_out": _left_out(pages is None),
        }  # fmt: skip
    document["ann"] = {}
    for done, count in enumerate(vector_counts):
        progress("vectors", done, len(vector_counts))
        document["ann"][str(count)] = approximate(count)
    progress("vectors", len(vector_counts), len(vector_counts))
    return document


def _left_out(corpus: bool) -> dict[str, str]:
    """Return what is not measured, and what has to be done for it."""
    left_out = {", ".join(KINDS): f"without --quick, after {GET_THEM}"} if corpus else {}
    if not rag_langchain.is_here():
        left_out["retrieve_ratio_to_langchain"] = "make setup-chains"
    return left_out


def _worst_gap(quality: dict[str, dict[str, dict[str, float]]]) -> float:
    """Return by how much hybrid search stays behind the better of its legs, on the set and score where that is worst."""
    return max(max(of["bm25"][name], of["dense"][name]) - of["hybrid"][name] for of in quality.values() for name in of["hybrid"])


def _mean_gain(quality: dict[str, dict[str, dict[str, float]]]) -> float:
    gains = [of["hybrid"][name] - max(of["bm25"][name], of["dense"][name]) for of in quality.values() for name in of["hybrid"]]
    return sum(gains) / len(gains)
