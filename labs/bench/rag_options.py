"""What the options of retrieval bring, and what they cost, on the questions for testing. Run as a part of: llmlab bench rag.

reranker           the right paragraph first, and how good the order is
neighbours         an accepted answer stands in what the model is shown
diversity          other paragraphs among the first five, and what that costs the right one
split_questions    two questions in one: the paragraphs of both among the first four
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from labs.bench import xquad
from labs.bench.rag_sets import Set, of_one
from pipelines.rag.parts import parts

if TYPE_CHECKING:
    from pipelines.rag.retrieve import Retriever

OPTIONS: dict[str, dict[str, Any]] = {
    "as configured": {}, "reranker=maxsim": {"reranker": "maxsim"}, "diversity=0.3": {"diversity": 0.3},
    "neighbours=1": {"neighbours": 1}, "split_questions=true": {"split_questions": True},
}  # fmt: skip
READ, AMONG, BOTH_AMONG, SHOWN = 10, 5, 4, 3


def options(asked: Set) -> dict[str, dict[str, float]]:
    """Return for each option what it does to the questions of a set of XQuAD.

    Args:
        asked: questions about paragraphs; its index is searched.
    """
    from pipelines.rag.rerank import load_reranker

    found = {}
    for name, changed in OPTIONS.items():
        config = asked.retriever.config.model_copy(update=changed)
        found[name] = _measured(asked, replace(asked.retriever, config=config, reranker=load_reranker(config.reranker)))
    return found


def joined_questions(asked: Set) -> list[tuple[str, frozenset[str], frozenset[str]]]:
    """Return two questions as one, with what is right for each: every question and the one half the set away.

    Pairs about one paragraph, and pairs that `pipelines.rag.parts` does not take apart again, are left out.
    """
    half = len(asked.questions) // 2
    pairs = zip(asked.questions[:half], asked.questions[half:], strict=False)
    both = [(f"{a.text.rstrip(' ?')} and {b.text[:1].lower()}{b.text[1:]}", a.right, b.right) for a, b in pairs]
    return [(text, first, second) for text, first, second in both if first != second and len(parts(text)) == 2]


def _measured(asked: Set, retriever: Retriever) -> dict[str, float]:
    answers = {q.question: q.answers for questions in xquad.paragraphs().values() for q in questions}
    total = dict.fromkeys(["recall_at_1", "mrr", "ndcg_at_10", "answer_shown", "paragraphs_among_5"], 0.0)
    seconds = []
    for question in asked.questions:
        began = time.perf_counter()
        hits = retriever.retrieve(question.text, READ).hits
        seconds.append(time.perf_counter() - began)
        sources = [hit.source for hit in hits]
        shown = " ".join(hit.text for hit in hits[:SHOWN])
        scores = of_one(list(dict.fromkeys(sources)), question.right)
        scores["answer_shown"] = float(any(answer in shown for answer in answers[question.text]))
        scores["paragraphs_among_5"] = float(len(set(sources[:AMONG])))
        for name in total:
            total[name] += scores[name] / len(asked.questions)
    return total | {"both_among_4": _both(asked, retriever), "ms": 1000 * median(seconds)}


def _both(asked: Set, retriever: Retriever) -> float:
    """Return for how many joined questions the paragraphs of both are among the first `BOTH_AMONG` passages."""
    pairs = joined_questions(asked)
    both = 0
    for text, first, second in pairs:
        sources = {hit.source for hit in retriever.retrieve(text, BOTH_AMONG).hits}
        both += bool(first & sources) and bool(second & sources)
    return both / max(len(pairs), 1)
