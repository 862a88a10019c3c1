"""Rows from questions that people have answered: what a row shows and cites, what abstains, and what is left out or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import load, named
from pipelines.errors import ConfigError, DataError
from pipelines.rag.answer import ABSTENTION, parse
from pipelines.rag.asked import Asked
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from pipelines.tune.files import read_rows
from pipelines.tune.from_questions import check_out, make, write

TOWNS = ("Aldery", "Brunswold", "Castor", "Dunmere", "Eastham", "Farleigh", "Gransted", "Hollin")
ASKED = [
    *(Asked(f"When was {town} founded?", f"{town}.md", f"in {1200 + n}") for n, town in enumerate(TOWNS)),
    *(Asked(f"Where is the market of {town}?", f"{town}.md", "on the bridge.") for town in TOWNS),
]


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    root = tmp_path_factory.mktemp("towns")
    for n, town in enumerate(TOWNS):
        text = f"# {town}\n\n{town} was founded in {1200 + n} by a weaver. Its market is held on the bridge.\n"
        (root / f"{town}.md").write_text(text, encoding="utf-8")
    config, embedder = load(named("rag", "default"), RagConfig, ["embedder=wordllama"]), load_embedder("wordllama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_INDEX", str(root / "index"))
        sync(root, "towns", config, embedder)
        return Retriever(open_index("towns", embedder), embedder, config)


def test_a_row_cites_the_passage_that_answers(towns: Retriever, tmp_path: Path) -> None:
    made = make(ASKED, towns, 3, 0.0, 1, lambda *_: None)
    assert len(made.rows) == 16 and not made.lost
    cited = set()
    for row in made.rows:
        passages = row["messages"][1]["content"].split("\n")[:3]
        reply = parse(row["messages"][2]["content"], 3)
        assert reply.text == row["answer"] and not reply.abstained
        assert row["source"].removesuffix(".md") in passages[reply.cited[0] - 1]
        cited.add(reply.cited[0])
    assert len(cited) > 1  # the place tells nothing
    by_source = {row["source"]: row["messages"][1]["content"].split("\n")[:3] for row in made.rows}
    assert all(row["messages"][1]["content"].split("\n")[:3] == by_source[row["source"]] for row in made.rows)
    write(made.rows, tmp_path / "rows.jsonl")
    assert [row.reply for row in read_rows(tmp_path / "rows.jsonl")] == [row["messages"][2]["content"] for row in made.rows]


def test_what_is_withheld_abstains_unless_another_passage_answers(towns: Retriever) -> None:
    made = make([*ASKED, Asked("Who painted the ceiling?", None)], towns, 3, 1.0, 1, lambda *_: None)
    assert {row["messages"][2]["content"] for row in made.rows} == {ABSTENTION}
    assert {row["question"] for row in made.rows} == {*(q.text for q in ASKED[:8]), "Who painted the ceiling?"}
    for row in made.rows[:8]:
        assert row["answer"] not in row["messages"][1]["content"]
    half = make(ASKED[:8], towns, 3, 0.5, 1, lambda *_: None)
    assert 0 < sum(row["withheld"] for row in half.rows) < 8
    assert half == make(ASKED[:8], towns, 3, 0.5, 1, lambda *_: None)


def test_an_answer_that_stands_nowhere_is_left_out_and_named(towns: Retriever) -> None:
    wrong = Asked("When was Castor founded?", "Castor.md", "in 12")
    made = make([wrong, ASKED[0]], towns, 2, 0.0, 1, lambda *_: None)
    assert made.lost == [wrong] and len(made.rows) == 1


def test_questions_that_cannot_be_used_are_refused(towns: Retriever, tmp_path: Path) -> None:
    for one, text in ((Asked("Where?", "Castro.md", "x"), "Castor.md"), (Asked("Where?", "Castor.md"), "no answer")):
        with pytest.raises(DataError, match=text):
            make([one], towns, 2, 0.0, 1, lambda *_: None)
    (tmp_path / "there.jsonl").write_text("")
    for out in (tmp_path / "rows.txt", tmp_path / "none" / "rows.jsonl", tmp_path / "there.jsonl"):
        with pytest.raises(ConfigError):
            check_out(out)
