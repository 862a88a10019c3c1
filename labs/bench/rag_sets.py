"""Question sets whose right passages are known, and how well a search does on them.

XQuAD (labs.bench.xquad): a passage is right if it is a piece of the question's paragraph. The knowledge base: a passage is right
if it states the fact. Run as a part of: llmlab bench rag
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from labs.bench import xquad
from pipelines.config import load, named
from pipelines.rag.index import MAX_K, RagConfig

if TYPE_CHECKING:
    from pipelines.rag.chunk import Chunk
    from pipelines.rag.generation import Progress
    from pipelines.rag.rerank import Reranker
    from pipelines.rag.retrieve import Retriever

CUTS = (1, 5, 10)
CHANGED_SHARE = 0.01


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


def scores(asked: Set, dense_weight: float | None, reranker: Reranker | None = None) -> dict[str, float]:
    """Return recall at `CUTS`, MRR and nDCG at 10 over the questions of a set.

    Args:
        asked: the set.
        dense_weight: of the vectors; None takes the set's own configuration.
        reranker: puts the best candidates in another order.
    """
    from pipelines.rag.ranking import rank

    config = asked.retriever.config
    retriever = replace(asked.retriever, reranker=reranker)
    if dense_weight is not None:
        config = config.model_copy(update={"dense_weight": dense_weight})
    vectors = retriever.embedder.embed_questions([q.text for q in asked.questions])
    total = dict.fromkeys([*(f"recall_at_{cut}" for cut in CUTS), "mrr", "ndcg_at_10"], 0.0)
    for question, vector in zip(asked.questions, vectors, strict=True):
        ranked = retriever.reranked(question.text, rank(retriever.index, config, question.text, vector, MAX_K))
        found = list(dict.fromkeys(asked.key(retriever.index.chunks[row]) for row in ranked.rows.tolist()))
        for name, value in of_one(found, question.right).items():
            total[name] += value / len(asked.questions)
    return total


def of_one(found: Sequence[str], right: frozenset[str]) -> dict[str, float]:
    """Return the scores of one ranking; recall is whether any right name is among the first."""
    first = next((place for place, name in enumerate(found) if name in right), None)
    gain = sum(1 / math.log2(place + 2) for place, name in enumerate(found[:10]) if name in right)
    best = sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))
    cuts = {f"recall_at_{cut}": float(first is not None and first < cut) for cut in CUTS}
    return {**cuts, "mrr": 0.0 if first is None else 1 / (first + 1), "ndcg_at_10": gain / best}


@contextmanager
def indexes_in(folder: Path) -> Iterator[None]:
    """Let indexes be made and read in a folder, not among the user's."""
    before = os.environ.get("LLMLAB_INDEX")
    os.environ["LLMLAB_INDEX"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LLMLAB_INDEX"]
        else:
            os.environ["LLMLAB_INDEX"] = before


def xquad_index(folder: Path, progress: Progress) -> tuple[Retriever, float, float]:
    """Return a retriever over all paragraphs, and the seconds of the first sync and of one after a small change.

    Args:
        folder: for the paragraphs as files.
        progress: is told the steps of the first sync.

    Raises:
        DataError: the XQuAD file is absent.
    """
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


def xquad_sets(retriever: Retriever) -> Iterator[Set]:
    """Yield the questions of the articles that are learnt from elsewhere, and those of the articles for testing."""
    paragraphs, tested = xquad.paragraphs(), {q.id for q in xquad.held_out_questions(None)}
    for name, test in (("xquad_train", False), ("xquad_test", True)):
        asked = tuple(Asked(q.question, frozenset({f"{paragraph}.txt"})) for paragraph, questions in paragraphs.items()
                      for q in questions if (q.id in tested) == test)  # fmt: skip
        yield Set(name, retriever, asked, lambda chunk: chunk.source)


def knowledge_set(progress: Progress) -> Set:
    """Return questions about the models of the catalogue, on the index that the reader is trained with."""
    from pipelines.catalogue import document_rows
    from pipelines.tune.data import corpora, holding, load_reader, questions_about

    progress("knowledge base", 0, 1)
    config = load_reader()
    _, whole = corpora(config)
    chunks = whole.retriever.index.chunks
    asked = []
    for model in document_rows():
        for question in questions_about(model, config):
            right = frozenset(chunks[whole.rows[place]].id for place in holding(whole, question))
            if right:
                asked.append(Asked(question.text, right))
    progress("knowledge base", 1, 1)
    return Set("knowledge", whole.retriever, tuple(asked), lambda chunk: chunk.id)
