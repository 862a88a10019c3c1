"""When to say that the documents hold no answer, before a model is asked: a threshold learned for each index.

The sign is the mean of two: the largest cosine of question and passage, and the largest share of the question's words, weighed
by their rarity, that one of the first passages has. Below the threshold the question is not answered.

It is learned from questions whose answers are known to be there. Each is asked twice, once of all documents and once without
the document that answers it, as the hardest question that has no answer: its subject is there and its answer is not. The
threshold is what at most a stated share of the answerable questions stay below; how many of the others it catches is told.
It lies beside the generations of its index, so a sync of the same folder keeps it; with another embedder, another folder or
another weighing it does not hold, and is left alone.
Run: llmlab index calibrate knowledge --questions questions.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import DataError
from pipelines.rag import generation
from pipelines.rag.asked import Asked, check_sources
from pipelines.runs import disk_trouble_is_explained, write_text

if TYPE_CHECKING:
    from pipelines.rag.index import Index, RagConfig
    from pipelines.rag.retrieve import Retriever

FILE, FORMAT = "abstention.json", 1
LOOKED_AT = 3  # passages
FEWEST = 20  # questions of each kind


@dataclass(frozen=True)
class Threshold:
    """What was learned.

    Attributes:
        value: a question whose sign is below is not answered.
        refused: share of the answerable questions that are below.
        caught: share of the questions without an answer that are below.
        answerable: how many questions had an answer.
        unanswerable: how many had none.
        auc: of the sign: how often it is larger for an answerable question than for another.
        holds_for: what decides the sign: embedder, folder of the documents, and fields of the configuration.
    """

    value: float
    refused: float
    caught: float
    answerable: int
    unanswerable: int
    auc: float
    holds_for: str


def sign(index: Index, question: str, rows: Sequence[int], cosines: Sequence[float]) -> float:
    """Return how much speaks for an answer in some passages, 0..1.

    Args:
        index: that they are of.
        question: what is asked.
        rows: of the passages; the best `LOOKED_AT` count.
        cosines: of question and passages; none if only words were asked.
    """
    if not rows:
        return 0.0
    said = float(index.words.shares(question, rows[:LOOKED_AT]).max())
    return (max(0.0, *cosines[:LOOKED_AT]) + said) / 2 if cosines else said


def learn(retriever: Retriever, asked: Sequence[Asked], at_most: float, report: Callable[[int, int], None]) -> Threshold:
    """Return the threshold below which at most a share of the answerable questions stay.

    Args:
        retriever: of the index.
        asked: questions; those with a source are asked without it as well.
        at_most: the share, 0..1.
        report: is told (questions done, questions in all).

    Raises:
        DataError: a source is not in the index, a question cannot be asked, or fewer than `FEWEST` have a source.
    """
    import numpy as np

    _check(retriever, asked)
    sources = np.array([chunk.source for chunk in retriever.index.chunks])
    with_answer: list[float] = []
    without: list[float] = []
    for done, one in enumerate(asked):
        report(done, len(asked))
        (without if one.source is None else with_answer).append(retriever.sign(one.text))
        if one.source is not None:
            without.append(retriever.sign(one.text, np.flatnonzero(sources != one.source)))
    report(len(asked), len(asked))
    there, absent = np.sort(with_answer), np.array(without)
    value = float(there[int(at_most * len(there))])
    larger = (there[:, None] > absent[None]).mean() + (there[:, None] == absent[None]).mean() / 2
    return Threshold(value, float((there < value).mean()), float((absent < value).mean()), len(there), len(absent),
                     float(larger), _holds_for(retriever.index, retriever.config))  # fmt: skip


def save(name: str, threshold: Threshold) -> Path:
    """Keep a threshold with its index; return where."""
    path = generation.folder_of(name) / FILE
    with disk_trouble_is_explained(path):
        write_text(path, json.dumps({"format": FORMAT, **asdict(threshold)}, indent=2) + "\n")
    return path


def kept(index: Index, config: RagConfig) -> Threshold | None:
    """Return the threshold of an index; None if there is none for this embedder, these documents and this configuration.

    Raises:
        DataError: the file is broken.
    """
    path, name = generation.folder_of(index.name) / FILE, index.name
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        version, value = held.pop("format"), float(held.pop("value"))
        found = Threshold(value, **held)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise DataError(f"{path} cannot be read", "what llmlab index calibrate wrote",
                        f"llmlab index calibrate {name}, or delete the file") from None  # fmt: skip
    return found if (version, found.holds_for) == (FORMAT, _holds_for(index, config)) else None


def learned_at(name: str) -> int | None:
    """Return when the threshold of an index was written, in nanoseconds; None if there is none."""
    try:
        return (generation.folder_of(name) / FILE).stat().st_mtime_ns
    except OSError:
        return None


def _holds_for(index: Index, config: RagConfig) -> str:
    from pipelines.rag import ranking

    facts = [index.manifest["fingerprint"], index.manifest["docs"], config.dense_weight, config.candidates, config.stemmer,
             ranking.FUSION]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check(retriever: Retriever, asked: Sequence[Asked]) -> None:
    check_sources(asked, retriever.index)
    for one in asked:
        retriever.check(one.text, LOOKED_AT)
    there = sum(one.source is not None for one in asked)
    if there < FEWEST:
        raise DataError(f"{there} questions have a source", f"at least {FEWEST}, or the threshold says little")
