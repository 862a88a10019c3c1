"""Scores of a reader: exact match and token F1 as SQuAD defines them (Rajpurkar et al. 2016, arXiv 1606.05250), citation
accuracy, and F1 of abstention. Pure functions of text; nothing is generated here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.rag.answer import Reply
from pipelines.tune.data import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Scores:
    """Means over the questions of a part; each in 0..1.

    Attributes:
        f1: token F1 over the questions that have an answer, an abstention or a missed retrieval counting 0.
        exact_match: share of those questions whose normalised answer is the truth.
        citation_accuracy: of the questions whose passages hold the answer, the share with only right citations.
        abstention_f1: F1 of abstaining, where right means that no passage holds the answer.
    """

    f1: float
    exact_match: float
    citation_accuracy: float
    abstention_f1: float


def score(examples: Sequence[Example], replies: Sequence[Reply]) -> Scores:
    """Score replies against the examples they belong to, in the same order."""
    pairs = list(zip(examples, replies, strict=True))
    answerable = [(e.truth, "" if r.abstained else r.text) for e, r in pairs if e.truth is not None]
    held = [(e, r) for e, r in pairs if e.answer is not None]
    return Scores(
        f1=_mean([token_f1(text, truth) for truth, text in answerable]),
        exact_match=_mean([float(normalise(text) == normalise(truth)) for truth, text in answerable]),
        citation_accuracy=_mean([float(cites_rightly(e, r)) for e, r in held]),
        abstention_f1=class_f1([e.answer is None for e, _ in pairs], [r.abstained for _, r in pairs]),
    )


def cites_rightly(example: Example, reply: Reply) -> bool:
    """Return True if the reply cites at least one passage and only passages that hold the answer."""
    return bool(reply.cited) and not reply.invalid and set(reply.cited) <= set(example.citations)


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(predicted: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall over normalised tokens."""
    found, wanted = normalise(predicted).split(), normalise(truth).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def class_f1(truth: Sequence[bool], predicted: Sequence[bool]) -> float:
    """Return the F1 of the positive class; 0 if it is never predicted rightly."""
    both = sum(t and p for t, p in zip(truth, predicted, strict=True))
    return 2 * both / (sum(truth) + sum(predicted)) if both else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
