"""Training groups: which questions are asked about which passages.

A group is one set of retrieved passages with several questions, some of which the passages do not answer. Half of the
groups are retrieved with the right passages withheld, as it happens in service. In a share of the groups values are
exchanged between models and models get invented names (Longpre et al. 2021, arXiv 2109.05052), which makes the passage the
only place where the answer can be found, and the name in the question something to compare, not to remember.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from pipelines.catalogue import document_rows, find
from pipelines.errors import DataError
from pipelines.tune.data import Corpus, Example, Page, Question, ReaderConfig, about, by_fact, example, holding

WITHHELD_SHARE = 0.5
RENAMED_SHARE = 0.5


def training_groups(config: ReaderConfig, corpus: Corpus, count: int, per_group: int, seed: int) -> Iterator[list[Example]]:
    """Yield `count` groups of at most `per_group` examples; the examples of a group share their passages.

    Raises:
        DataError: every model of the catalogue is a test model.
    """
    rng = random.Random(seed)
    names = [m.name for m in document_rows() if m.name not in config.test_models]
    questions = [q for variants in by_fact(config, names) for q in variants]
    if not questions:
        raise DataError("the catalogue gives no training question", "models outside test_models", "edit configs/data/reader.yaml")
    for _ in range(count):
        asked = rng.choice(questions)
        withheld = holding(corpus, asked) if rng.random() < WITHHELD_SHARE else frozenset()
        passages = [corpus.passages[i] for i in corpus.search(asked.text, config.passages, withheld)]
        rng.shuffle(passages)
        pool = questions
        if rng.random() < config.exchanged_share:
            passages, pool = _rename(*_exchange_values(passages, questions, rng), config, rng)
        yield _draw(passages, pool, config, per_group, rng)


def _draw(passages: list[Page], questions: list[Question], config: ReaderConfig, size: int, rng: random.Random) -> list[Example]:
    """Draw the questions of a group: answerable ones, and ones that these passages nearly answer."""
    asked = [example(q, passages) for q in questions]
    answerable = [e for e in asked if e.answer is not None]
    keys = {e.key for e in answerable}
    near = [q for q, e in zip(questions, asked, strict=True) if e.answer is None and any(p.model == q.model for p in passages)]
    like = [q for q, e in zip(questions, asked, strict=True) if e.answer is None and q.key in keys] or questions
    abstentions = max(sum(rng.random() < config.abstention_share for _ in range(size)), size - len(answerable))
    drawn = []
    for _ in range(abstentions):
        kind = rng.choice(["near", "near", "like", "like", "invented", "invented", "off topic"])
        question = rng.choice(near if kind == "near" and near else like)
        if kind == "invented":
            question = about(question, invent(config, rng))
        elif kind == "off topic":
            question = Question("", kind, rng.choice(config.off_topic), None)
        drawn.append(example(question, passages))
    drawn += _one_per_fact(answerable, size - len(drawn), rng)
    rng.shuffle(drawn)
    return drawn


def invent(config: ReaderConfig, rng: random.Random) -> str:
    """Return the title of a model that does not exist."""
    return rng.choice(config.invented_roots) + rng.choice(config.invented_endings)


def _one_per_fact(examples: list[Example], count: int, rng: random.Random) -> list[Example]:
    """Draw without repeating a fact before every fact was drawn once."""
    seen: set[tuple[str, str, str | None]] = set()
    first: list[Example] = []
    rest: list[Example] = []
    for e in rng.sample(examples, k=len(examples)):
        fact = (e.model, e.key, e.answer)
        (rest if fact in seen else first).append(e)
        seen.add(fact)
    return (first + rest)[:count]


def _exchange_values(passages: list[Page], questions: list[Question], rng: random.Random) -> tuple[list[Page], list[Question]]:
    """Give each fact in the passages the value that another model has for the same key, in text and answer alike."""
    pool: dict[str, list[str]] = {}
    for q in questions:
        pool.setdefault(q.key, []).append(q.answer or "")
    present = {p.model for p in passages}
    facts = sorted({(q.model, q.key, q.answer or "") for q in questions if q.model in present})
    new_value = {fact: rng.choice(pool[fact[1]]) for fact in facts}
    by_model = {name: {find(name).title: find(name).title} for name, _, _ in facts}  # a size in a title stays
    for (name, _, old), new in new_value.items():
        by_model[name][old] = new
    changed = [replace(p, text=_replace_all(p.text, by_model.get(p.model, {}))) for p in passages]
    return changed, [replace(q, answer=new_value.get((q.model, q.key, q.answer or ""), q.answer)) for q in questions]


def _rename(
    passages: list[Page], questions: list[Question], config: ReaderConfig, rng: random.Random
) -> tuple[list[Page], list[Question]]:
    """Give some of the models in the passages an invented title, in passages and questions alike."""
    known = {q.model for q in questions}
    present = sorted({p.model for p in passages} & known)
    titles = {name: (find(name).title, invent(config, rng)) for name in present if rng.random() < RENAMED_SHARE}
    changed = [
        replace(p, title=p.title.replace(*titles[p.model]), text=p.text.replace(*titles[p.model])) if p.model in titles else p
        for p in passages
    ]
    return changed, [replace(q, text=q.text.replace(*titles[q.model])) if q.model in titles else q for q in questions]


def _replace_all(text: str, values: dict[str, str]) -> str:
    """Replace longer values first, through place-holders, so that a new value is never replaced again."""
    olds = sorted(values, key=lambda old: (-len(old), old))
    for number, old in enumerate(olds):
        text = text.replace(old, f"\0{number}\0")
    for number, old in enumerate(olds):
        text = text.replace(f"\0{number}\0", values[old])
    return text
