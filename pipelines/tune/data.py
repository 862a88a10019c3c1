"""The reader's instruction set: question + passages -> short answer with its citation, or the abstention sentence.

Everything is generated from the catalogue's facts and the pages of the knowledge base. The split is by model: no page
and no question of a test model is seen in training, so a score on the test part shows reading, not recall. How training
groups are drawn is in pipelines.tune.groups. Settings: configs/data/reader.yaml.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.catalogue import Model, document_rows, find
from pipelines.config import ROOT, Config, load, named
from pipelines.errors import ConfigError
from pipelines.rag.answer import messages, reply_text
from pipelines.rag.index import RagConfig
from pipelines.tune.rows import Row

if TYPE_CHECKING:
    from pipelines.rag.retrieve import Retriever

KNOWLEDGE = ROOT / "labs" / "knowledge"
INDEX_NAME = "instruction-set"


class ReaderConfig(Config):
    """How the instruction set is made."""

    rag: str
    passages: int = Field(ge=1, le=10)
    abstention_share: float = Field(ge=0, le=1)
    withheld_share: float = Field(ge=0, lt=1)
    exchanged_share: float = Field(ge=0, le=1)
    test_models: list[str] = Field(min_length=1)
    invented_roots: list[str] = Field(min_length=1)
    invented_endings: list[str] = Field(min_length=1)
    invented_titles_for_test: list[str] = Field(min_length=1)
    off_topic: list[str] = Field(min_length=1)
    phrasings: dict[str, list[str]]
    phrasings_by_source: dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Page:
    """A piece of a page, a passage to the reader; `model` is the catalogue name the page is about, or its file stem."""

    model: str
    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question about one model; `answer` is the fact as its page states it, or None if no page answers it."""

    model: str
    key: str
    text: str
    answer: str | None


@dataclass(frozen=True)
class Example:
    """A question with the passages it is asked about.

    Attributes:
        truth: the fact, whether or not the passages hold it; None if the question has no answer.
        answer: what a perfect reader of these passages says; None means that they do not hold the answer.
        citations: every passage number (from 1) that holds the answer; the first is the one to teach.
    """

    question: str
    model: str
    key: str
    passages: tuple[Page, ...]
    truth: str | None
    answer: str | None
    citations: tuple[int, ...]

    @property
    def reply(self) -> str:
        """Return what a perfect reader writes: the answer with its citation, or the abstention sentence."""
        return reply_text(self.answer or "", self.citations[0] if self.citations else None)

    @property
    def row(self) -> Row:
        """Return the example as chat turns."""
        return Row((*messages(self.question, self.passages), {"role": "assistant", "content": self.reply}))


def load_reader(name: str = "reader") -> ReaderConfig:
    """Read configs/data/<name>.yaml and check it against the catalogue."""
    config = load(named("data", name), ReaderConfig)
    known = {model.name for model in document_rows()}
    wrong = sorted(set(config.test_models) - known)
    if wrong:
        raise ConfigError(
            f"configs/data/{name}.yaml: test_models not in the catalogue: {', '.join(wrong)}", f"names of {sorted(known)}"
        )
    return config


def resolved(config: ReaderConfig) -> dict[str, Any]:
    """Return everything that decides the instruction set, for the configuration of a run."""
    rag = load(named("rag", config.rag), RagConfig)
    pages = hashlib.sha256()
    for path in sorted(KNOWLEDGE.glob("*.md")):
        pages.update(path.name.encode() + b"\0" + path.read_bytes())
    said = [m.model_dump(include={"name", "title", "facts"}) for m in document_rows()]
    facts = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    return {
        "reader": config.model_dump(),
        "rag": rag.model_dump(),
        "pages_sha256": pages.hexdigest(),
        "facts_sha256": facts.hexdigest(),
    }


class Corpus:
    """Passages of some pages, searched by their vectors alone: a reader meets harder passages so than in service.

    Args:
        retriever: of an index that holds these pages, and maybe others.
        rows: of the index, which the passages are.
    """

    def __init__(self, retriever: Retriever, rows: Sequence[int]) -> None:
        self.retriever, self.rows = retriever, list(rows)
        chunks = [retriever.index.chunks[row] for row in rows]
        self.passages = [Page(Path(c.source).stem, c.title, c.text) for c in chunks]
        self._position = {row: position for position, row in enumerate(self.rows)}

    def search(self, question: str, k: int, without: frozenset[int] = frozenset()) -> list[int]:
        """Return the positions of the `k` best passages, best first, leaving out those in `without`."""
        import numpy as np

        allowed = np.array([row for position, row in enumerate(self.rows) if position not in without])
        found = self.retriever.index.nearest(self.retriever.embedder.embed_questions([question])[0], k, allowed)
        return [self._position[row] for row in found.rows.tolist()]


def corpora(config: ReaderConfig, root: Path = KNOWLEDGE) -> tuple[Corpus, Corpus]:
    """Return (training corpus, whole corpus); the first has no page of a test model.

    The pages are indexed as users' documents are, under a name of their own, so only changed pages are embedded again.

    Raises:
        DataError: the folder holds no readable document.
    """
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import open_index, sync
    from pipelines.rag.retrieve import Retriever

    rag = load(named("rag", config.rag), RagConfig)
    embedder = load_embedder(rag.embedder)
    sync(root, INDEX_NAME, rag, embedder)
    retriever = Retriever(open_index(INDEX_NAME, embedder), embedder, rag)
    whole = Corpus(retriever, range(len(retriever.index)))
    learnt = [row for row, page in enumerate(whole.passages) if page.model not in config.test_models]
    return Corpus(retriever, learnt), whole


def questions_about(model: Model, config: ReaderConfig) -> list[Question]:
    """Return every question that the facts of a model give, in every phrasing."""
    found = []
    for key, fact in model.facts.items():
        both = fact.document is not None and fact.maker is not None
        for source, answer in (("document", fact.document), ("maker", fact.maker)):
            if answer is None:
                continue
            phrasings = config.phrasings_by_source[source] if both else config.phrasings
            found += [Question(model.name, key, p.format(title=model.title), answer) for p in phrasings.get(key, [])]
    return found


def held_out_examples(config: ReaderConfig, corpus: Corpus, limit: int | None = None, seed: int = 11) -> list[Example]:
    """Return the held-out part: one phrasing of each fact of each test model, with retrieved passages.

    A share of the part (`withheld_share`) asks a second time with the right passages withheld, or about an invented
    model; there the right reply is to abstain. `limit` keeps an evenly drawn sample, for quick runs.
    """
    rng = random.Random(seed)
    asked = [rng.choice(variants) for variants in by_fact(config, config.test_models)]
    examples = [_retrieved(q, corpus, config.passages) for q in asked]
    unanswerable = rng.sample(asked, k=round(len(asked) * config.withheld_share / (1 - config.withheld_share)))
    for number, question in enumerate(unanswerable):
        title = rng.choice(config.invented_titles_for_test) if number % 3 == 2 else find(question.model).title
        examples.append(_retrieved(about(question, title), corpus, config.passages, holding(corpus, question)))
    rng.shuffle(examples)
    return examples[:limit]


def by_fact(config: ReaderConfig, names: Sequence[str]) -> list[list[Question]]:
    """Return the questions about the named models: one list for each fact, with all its phrasings."""
    groups: dict[tuple[str, str, str | None], list[Question]] = {}
    for model in document_rows():
        if model.name in names:
            for q in questions_about(model, config):
                groups.setdefault((q.model, q.key, q.answer), []).append(q)
    return list(groups.values())


def about(question: Question, title: str) -> Question:
    """Return the same question about a model of another title, which has no answer."""
    return replace(question, model="", text=question.text.replace(find(question.model).title, title), answer=None)


def example(question: Question, passages: Sequence[Page]) -> Example:
    """Return the question asked about these passages."""
    citations = tuple(n for n, p in enumerate(passages, 1) if holds(p, question))
    answer = question.answer if citations else None
    return Example(question.text, question.model, question.key, tuple(passages), question.answer, answer, citations)


def holds(page: Page, question: Question) -> bool:
    """Return True if the page is about the question's model and states the answer."""
    return question.answer is not None and page.model == question.model and question.answer in page.text


def holding(corpus: Corpus, question: Question) -> frozenset[int]:
    """Return the positions of the passages that hold the answer."""
    return frozenset(i for i, page in enumerate(corpus.passages) if holds(page, question))


def _retrieved(question: Question, corpus: Corpus, k: int, without: frozenset[int] = frozenset()) -> Example:
    return example(question, [corpus.passages[i] for i in corpus.search(question.text, k, without)])
