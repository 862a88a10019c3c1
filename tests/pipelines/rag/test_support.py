"""Sentences beside what they cite: what stands there passes, what stands elsewhere or nowhere does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from labs.bench import xquad
from pipelines.rag.embed import Embedder
from pipelines.rag.index import Hit, RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from pipelines.rag.support import check, sentences

NO_DATA = pytest.mark.skipif(
    not (xquad.data_folder() / xquad.FILE).is_file(), reason="no XQuAD file; LLMLAB_DATA names its folder"
)


@pytest.fixture
def retriever(docs: Path, config: RagConfig, minilm: Embedder) -> Retriever:
    sync(docs, "lab", config, minilm)
    return Retriever(open_index("lab", minilm), minilm, config)


def hits(retriever: Retriever, *sources: str) -> list[Hit]:
    rows = {c.source: row for row, c in enumerate(retriever.index.chunks) if "licence" in c.title}
    return [retriever.index.hit(rows[source], 1.0, None) for source in sources]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Falcon 40B comes from TII [1].", [((1,), True)]),
        ("It comes from Abu Dhabi. [1] It is licensed under Apache 2.0 [1].", [((1,), True), ((1,), True)]),
        ("Falcon 40B comes from TII [2].", [((2,), False)]),
        ("Falcon 40B comes from TII [1][2].", [((1, 2), True)]),
        ("Falcon 180B comes from TII [1].", [((1,), False)]),
        ("Anthropic launched it in July 2024 [2].", [((2,), False)]),
        ("Anthropic launched it in July 2023.", [((), True)]),
        ("Google launched it in Paris with great success.", [((), False)]),
        ("Claude 2 was launched by Anthropic [7].", [((), True)]),
        ("Yes.", [((), None)]),
        ("It is that one, and so on [1]!", [((1,), None)]),
        ("", []),
    ],
)
def test_a_sentence_is_held_or_not(
    answer: str, expected: list[tuple[tuple[int, ...], bool | None]], retriever: Retriever
) -> None:
    found = check(answer, hits(retriever, "falcon.md", "claude-2.md"), retriever)
    assert [(s.cited, s.supported) for s in found] == expected
    assert all("[" not in s.text for s in found)


def test_sentences_end_where_they_end() -> None:
    assert sentences("It has 7.2 B parameters [1]. See v1.5! [2][3] Is it so? \"Yes.\" No end") == [
        "It has 7.2 B parameters [1].", "See v1.5! [2][3]", "Is it so?", "\"Yes.\" No end",
    ]  # fmt: skip


@NO_DATA
@pytest.mark.slow
def test_statements_are_held_by_their_paragraph_and_not_by_its_neighbour(
    tmp_path: Path, config: RagConfig, minilm: Embedder, report_figure: Callable[[str], None]
) -> None:
    """A question with its answer is the statement, so few words are copied; the next paragraph is about the same subject."""
    paragraphs = list(xquad.paragraphs().values())[:60]
    for number, questions in enumerate(paragraphs):
        (tmp_path / f"p{number:02}.txt").write_text(questions[0].paragraph, encoding="utf-8")
    sync(tmp_path, "lab", config.model_copy(update={"chunk_max_tokens": 256}), minilm)
    retriever = Retriever(open_index("lab", minilm), minilm, config)
    first = {c.source: retriever.index.hit(row, 1.0, None) for row, c in reversed(list(enumerate(retriever.index.chunks)))}
    right, wrong = [], []
    for number, questions in enumerate(paragraphs[:-1]):
        mine, neighbour = first[f"p{number:02}.txt"], first[f"p{number + 1:02}.txt"]
        for q in questions:
            if q.answers[0] in mine.text and q.answers[0] not in neighbour.text:
                statement = f"{q.question.rstrip('?')}: {q.answers[0]}."
                right += [s.supported for s in check(statement, [mine], retriever)]
                wrong += [s.supported for s in check(statement, [neighbour], retriever)]
    found, mistaken = right.count(True) / len(right), wrong.count(True) / len(wrong)
    report_figure(f"statements held by their paragraph {found:.3f}, by its neighbour {mistaken:.3f}, of {len(right)}")
    assert len(right) > 200 and found > 0.93 and mistaken < 0.03
