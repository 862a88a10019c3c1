"""Answers measured as a client gets them, from the gateway with its engine and index: `llmlab bench answers`.

The paragraphs of XQuAD (labs.bench.xquad) are indexed in a temporary folder, and a threshold of abstention is learned from
questions of the articles for training. Then questions of the articles for testing go to /v1/rag/query, for the base and for a
tuned run: each of them as it is, and some again without the paragraph that answers them. These count as unanswerable, though
another paragraph of the article may happen to hold the answer. What is found, without answers, is measured in labs.bench.rag.

`reader_rows` makes rows of the articles for training, for a reader to be tuned before it is asked (`--learn`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from labs.ask import ask
from labs.bench import xquad
from labs.bench.rag_corpus import cache_folder
from labs.bench.rag_sets import indexes_in, xquad_index
from pipelines.errors import ConfigError
from pipelines.rag.asked import Asked

if TYPE_CHECKING:
    from pipelines.rag.abstention import Threshold
    from pipelines.rag.retrieve import Retriever
    from pipelines.runs import Run

QUICK_QUESTIONS, FULL_QUESTIONS = 24, 100
QUICK_UNANSWERABLE, FULL_UNANSWERABLE = 12, 50
LEARNED_FROM, MOST_REFUSED = 300, 0.02  # training questions, and the share of them that may stay below the threshold
SEED = 17
REPLY_TOKENS = 64  # an accepted answer and its citation have fewer
INDEX, ROWS_FILE = "xquad", "answers-rows.jsonl"
WITHHELD = 0.25  # of the paragraphs, in rows for training
KINDS, WHO_ABSTAINS = ("base", "tuned"), ("retrieval", "model")

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Query:
    """A question as it is sent.

    Attributes:
        question: what is asked, and the accepted answers.
        source: the document that is its paragraph.
        answerable: False leaves this document out of the search.
    """

    question: xquad.Question
    source: str
    answerable: bool

    @property
    def where(self) -> str | None:
        """Return which passages are searched, all for None."""
        return None if self.answerable else f'not source = "{self.source}"'


def bench_answers(run: Run, questions: int, unanswerable: int, progress: Progress, say: Say) -> dict[str, Any]:
    """Return the document of a run of the bench.

    Args:
        run: a finetune run; its base is asked too.
        questions: how many are asked of all documents.
        unanswerable: how many are asked without the one that answers them.
        progress: is told (stage, done, total).
        say: receives the server's lines.

    Raises:
        ConfigError: there are fewer questions for testing.
        DataError: the XQuAD file is absent.
        LabError: the server does not start, or refuses a question.
    """
    from pipelines.hardware import use_all_cores
    from serving.launch import running
    from serving.settings import load_serve_config

    asked = queries(questions, unanswerable)
    config = load_serve_config("default", ["port=0", "engine_port=0", "engine=llamacpp", "keys=null", f"index={INDEX}"])
    use_all_cores()
    with TemporaryDirectory() as folder, indexes_in(Path(folder) / "index"):
        retriever, _, _ = xquad_index(Path(folder), progress)
        threshold = _learned_threshold(retriever, progress)
        document: dict[str, Any] = {
            "model": run.model, "run": run.id, "questions": questions, "unanswerable": unanswerable,
            "passages": retriever.config.top_k, "reply_tokens": REPLY_TOKENS,
            "threshold": {key: value for key, value in asdict(threshold).items() if key != "fingerprint"},
        }  # fmt: skip
        with running(run.model, config, adapter=run.id, say=say) as served:
            for kind, name in zip(KINDS, served.service.names, strict=True):
                answers = _answers(served.url, name, asked, served.service.upstream.launch.slots, progress)
                document[kind] = scores(asked, answers)
    return document


def reader_rows(progress: Progress) -> Path:
    """Write rows of the training articles, with passages as service shows them, and return the file; the same each time.

    Raises:
        DataError: the XQuAD file is absent.
    """
    from pipelines.tune import from_questions

    with TemporaryDirectory() as folder, indexes_in(Path(folder) / "index"):
        retriever, _, _ = xquad_index(Path(folder), progress)
        sources = _sources()
        asked = [Asked(q.question, sources[q.id], q.answers[0]) for q in _training_questions()]
        made = from_questions.make(asked, retriever, retriever.config.top_k, WITHHELD, SEED,
                                   lambda done, total: progress("rows", done, total))  # fmt: skip
    path = cache_folder() / ROWS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    from_questions.write(made.rows, path)
    return path


def queries(questions: int, unanswerable: int) -> list[Query]:
    """Return the same questions for testing each time: some as they are, and the first of them without their paragraph.

    They are drawn one by one from all test articles, since those about one paragraph go right or wrong together.

    Raises:
        ConfigError: there are fewer.
        DataError: the XQuAD file is absent.
    """
    held, most = xquad.held_out_questions(None), max(questions, unanswerable)
    if most > len(held):
        raise ConfigError(f"{most} questions were asked for", f"at most {len(held)}, which are for testing")
    drawn, sources = random.Random(SEED).sample(held, most), _sources()
    as_they_are = [Query(q, sources[q.id], True) for q in drawn[:questions]]
    return as_they_are + [Query(q, sources[q.id], False) for q in drawn[:unanswerable]]


def scores(asked: Sequence[Query], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of one model; shares of nothing are None.

    Exact match, F1, retrieval and citation recall are of all answerable questions, an abstention counting 0; citation precision
    and support are of those that were not abstained from. A citation is right if its passage is of the question's paragraph.

    Args:
        asked: the queries.
        answers: of /v1/rag/query, in their order.
    """
    pairs = list(zip(asked, answers, strict=True))
    answerable = [(query, answer) for query, answer in pairs if query.answerable]
    answered = [(query, answer) for query, answer in answerable if not answer["abstained"]]
    read = xquad.scored([q.question for q, _ in answerable], ["" if a["abstained"] else a["answer"] for _, a in answerable])
    right = [[passage["source"] == query.source for passage in answer["citations"]] for query, answer in answered]
    found = [any(passage["source"] == query.source for passage in answer["passages"]) for query, answer in answerable]
    checked = [s["supported"] for _, answer in answered for s in answer["sentences"] if s["supported"] is not None]
    refused = _abstained([answer for _, answer in answerable])
    refused_rightly = _abstained([answer for query, answer in pairs if not query.answerable])
    counts = {
        "answerable": len(answerable), "unanswerable": len(pairs) - len(answerable), "answered": len(answered),
        "retrieval_hits": sum(found), "citations": sum(map(len, right)), "right_citations": sum(map(sum, right)),
        "rightly_cited": sum(map(any, right)), "invalid_citations": sum(len(a["invalid_citations"]) for _, a in answered),
        "checked_sentences": len(checked), "supported_sentences": sum(checked),
        "abstained_answerable": refused, "abstained_unanswerable": refused_rightly,
    }  # fmt: skip
    return {
        "exact_match": read.exact_match, "f1": read.f1,
        "retrieval_hit_rate": _share(sum(found), len(answerable)),
        "citation_precision": _share(counts["right_citations"], counts["citations"]),
        "citation_recall": _share(counts["rightly_cited"], len(answerable)),
        "supported_share": _share(sum(checked), len(checked)),
        "abstention_recall": _share(sum(refused_rightly.values()), counts["unanswerable"]),
        "false_abstention": _share(sum(refused.values()), len(answerable)),
        "counts": counts,
    }  # fmt: skip


def _learned_threshold(retriever: Retriever, progress: Progress) -> Threshold:
    """Return a threshold of training questions, and keep it with the index."""
    from pipelines.rag import abstention

    training, sources = _training_questions(), _sources()
    drawn = random.Random(SEED).sample(training, min(LEARNED_FROM, len(training)))
    asked = [Asked(q.question, sources[q.id]) for q in drawn]
    learned = abstention.learn(retriever, asked, MOST_REFUSED, lambda done, total: progress("threshold", done, total))
    abstention.save(INDEX, learned)
    return learned


def _training_questions() -> list[xquad.Question]:
    tested = {q.id for q in xquad.held_out_questions(None)}
    return [q for paragraph in xquad.paragraphs().values() for q in paragraph if q.id not in tested]


def _sources() -> dict[str, str]:
    """Return the document of each question, by the question's id."""
    return {q.id: f"{name}.txt" for name, paragraph in xquad.paragraphs().items() for q in paragraph}


def _answers(server: str, model: str, asked: Sequence[Query], at_once: int, progress: Progress) -> list[dict[str, Any]]:
    """Return the answers to some queries in their order; what is not sent yet when one fails, or at Ctrl-C, is not sent."""
    pool = ThreadPoolExecutor(at_once)
    try:
        sent = [pool.submit(ask, server, q.question.question, where=q.where, model=model, max_tokens=REPLY_TOKENS) for q in asked]
        for done, one in enumerate(as_completed(sent), 1):
            one.result()
            progress(model, done, len(asked))
        return [one.result() for one in sent]
    finally:
        pool.shutdown(cancel_futures=True)


def _abstained(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many were abstained from, by what said so."""
    return {who: sum(answer["abstained_by"] == who for answer in answers) for who in WHO_ABSTAINS}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
