"""Questions with their documents and answers -> rows for the reader, with passages as the index finds them.

For a team that has written down what people ask. Questions that one chunk answers share their passages, so that a training
computes these once: the chunk, and what retrieval finds beside it. For a share of the chunks it is withheld, and the right
reply is to abstain; so it is for a question that no document answers. Rows made from documents alone, with questions that an
engine writes, are the work of pipelines.tune.from_docs. Run by:

    llmlab data from-questions asked.jsonl --index notes --out notes.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError, DataError
from pipelines.rag.answer import messages, reply_text
from pipelines.rag.asked import Asked, check_sources
from pipelines.runs import disk_trouble_is_explained, write_text
from pipelines.tune.questions import holds

if TYPE_CHECKING:
    from pipelines.rag.chunk import Chunk
    from pipelines.rag.retrieve import Retriever


@dataclass(frozen=True)
class Made:
    """What came of the questions.

    Attributes:
        rows: as a file of rows holds them.
        lost: questions whose answer stands in no chunk of their document, as whole words.
    """

    rows: list[dict[str, Any]]
    lost: list[Asked]


def make(
    asked: Sequence[Asked], retriever: Retriever, passages: int, abstain: float, seed: int, report: Callable[[int, int], None]
) -> Made:
    """Return the rows for some questions.

    Args:
        asked: each with its answer, or without a source.
        retriever: of the index that holds their documents.
        passages: how many a row shows; as many as in service.
        abstain: share of the chunks that are withheld from their questions, 0..1.
        seed: decides which, and the order of passages.
        report: is told (groups done, groups in all).

    Raises:
        DataError: a source is not in the index, or a question has a source and no answer, or cannot be asked.
    """
    _check(asked, retriever, passages)
    groups, lost = _grouped(asked, retriever)
    rows = []
    for done, (right, questions) in enumerate(groups, 1):
        rows += _rows(right, questions, retriever, passages, abstain, random.Random(f"{seed} {questions[0].text}"))
        report(done, len(groups))
    return Made(rows, lost)


def check_out(out: Path) -> None:
    """Raise `ConfigError` unless rows can be written to this path, where nothing is yet."""
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise ConfigError(
            f"cannot write rows to {out}", "a file that ends with .jsonl, in an existing folder", "--out notes.jsonl"
        )
    if out.exists():
        raise ConfigError(f"{out} exists", "a new file", f"--out another.jsonl, or rm {out}")


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write rows as JSON lines, whole or not at all."""
    with disk_trouble_is_explained(out):
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _grouped(asked: Sequence[Asked], retriever: Retriever) -> tuple[list[tuple[Chunk | None, list[Asked]]], list[Asked]]:
    """Return (the chunk that answers, its questions), None for each question without one, and the questions that are lost."""
    by_source: dict[str, list[Chunk]] = {}
    for chunk in retriever.index.chunks:
        by_source.setdefault(chunk.source, []).append(chunk)
    by_chunk: dict[str, tuple[Chunk, list[Asked]]] = {}
    alone: list[Asked] = []
    lost: list[Asked] = []
    for one in asked:
        right = next((c for c in by_source.get(one.source or "", ()) if holds(c.text, one.answer or "")), None)
        if right:
            by_chunk.setdefault(right.id, (right, []))[1].append(one)
        else:
            (alone if one.source is None else lost).append(one)
    return [*by_chunk.values(), *((None, [one]) for one in alone)], lost


def _rows(
    right: Chunk | None, questions: Sequence[Asked], retriever: Retriever, passages: int, abstain: float, rng: random.Random
) -> list[dict[str, Any]]:
    """Return the rows of questions that share their passages."""
    hits = retriever.retrieve(rng.choice(questions).text, passages + 1).hits
    others = [retriever.index.chunks[hit.row] for hit in hits if right is None or hit.chunk_id != right.id]
    if right and rng.random() < abstain:
        right = None
    shown = [right, *others[: passages - 1]] if right else others[:passages]
    rng.shuffle(shown)
    return [_row(one, shown, shown.index(right) + 1 if right else None) for one in questions
            if right or not any(one.answer and holds(chunk.passage, one.answer) for chunk in shown)]  # fmt: skip


def _row(asked: Asked, shown: Sequence[Chunk], citation: int | None) -> dict[str, Any]:
    """Return a row; the reader of files passes over the other fields."""
    reply = reply_text(asked.answer or "", citation)
    return {"messages": [*messages(asked.text, shown), {"role": "assistant", "content": reply}], "question": asked.text,
            "answer": asked.answer, "withheld": citation is None, "source": asked.source,
            "group": asked.source or asked.text}  # fmt: skip


def _check(asked: Sequence[Asked], retriever: Retriever, passages: int) -> None:
    check_sources(asked, retriever.index)
    for one in asked:
        retriever.check(one.text, passages + 1)
        if one.source is not None and not (one.answer or "").strip():
            raise DataError(f"the question {one.text[:60]!r} has a source and no answer",
                            "an answer in the words of its document", "add it, or leave the source out")  # fmt: skip
