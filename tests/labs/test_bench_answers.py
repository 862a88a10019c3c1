"""The bench of answers: its scores on answers written by hand, and in earnest on made articles, through gateway and engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labs.bench import xquad
from labs.bench.answers import KINDS, Query, queries, scores
from pipelines.config import ROOT
from pipelines.errors import ConfigError
from pipelines.runs import Run
from tests.conftest import MODEL

TOWNS = ("Aldery", "Brunswold", "Castor", "Dunmere", "Eastham", "Farleigh", "Gransted", "Hollin", "Ibsley", "Jarrow")
TRADES = ("weaver", "baker", "glazier", "cooper")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 short articles in SQuAD's form; the last four are for testing, with two questions each."""
    folder, articles = tmp_path_factory.mktemp("data"), []
    for n in range(40):
        town, trade = f"{TOWNS[n % 10]} {'North South East West'.split()[n // 10]}", TRADES[n % 4]
        text = f"{town} is a town by the river. It was founded in {1200 + n} by a {trade}. Its market is held on the bridge."
        qas = [
            {"id": f"{n}a", "question": f"When was {town} founded?", "answers": [{"text": str(1200 + n)}]},
            {"id": f"{n}b", "question": f"Who founded {town}?", "answers": [{"text": trade}, {"text": f"a {trade}"}]},
        ]
        articles.append({"paragraphs": [{"context": text, "qas": qas}]})
    (folder / xquad.FILE).write_text(json.dumps({"data": articles}), encoding="utf-8")
    return folder


def bench(data: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"LLMLAB_DATA": str(data), **environment}
    return subprocess.run([sys.executable, "-m", "labs", "bench", "answers", *options], cwd=ROOT, env=os.environ | own,
                          capture_output=True, text=True, check=False)  # fmt: skip


def query(answer: str, *, answerable: bool = True) -> Query:
    return Query(xquad.Question("1", "", "Which?", (answer, f"{answer} itself")), "right.txt", answerable)


def answer(
    text: str, cited: list[str], passages: list[str], supported: list[bool | None], by: str | None = None
) -> dict[str, Any]:
    return {
        "answer": text, "abstained": by is not None, "abstained_by": by, "invalid_citations": [9] if text == "Oslo" else [],
        "citations": [{"source": source} for source in cited], "passages": [{"source": source} for source in passages],
        "sentences": [{"supported": one} for one in supported],
    }  # fmt: skip


def test_scores_of_answers_are_those_of_their_definitions() -> None:
    asked = [query("Paris"), query("Rome"), query("Bern"), query("Oslo town"), query("Kyiv"),
             *(query("Paris", answerable=False) for _ in range(3))]  # fmt: skip
    found = scores(asked, [
        answer("the Paris itself.", ["right.txt", "other.txt"], ["right.txt", "other.txt"], [True]),
        answer("Milan", ["other.txt"], ["other.txt"], [False]),
        answer("Bern", ["right.txt"], ["right.txt"], [False], "model"),
        answer("Oslo", [], ["right.txt"], [True, None]),
        answer("Kyiv", [], ["other.txt"], [], "retrieval"),
        answer("nothing", [], ["other.txt"], [], "retrieval"),
        answer("nothing", [], ["other.txt"], [False], "model"),
        answer("Paris", ["other.txt"], ["other.txt"], [True]),
    ])  # fmt: skip
    counts = found.pop("counts")
    assert found == {
        "exact_match": 1 / 5, "f1": pytest.approx((1 + 2 / 3) / 5), "retrieval_hit_rate": 3 / 5, "citation_precision": 1 / 3,
        "citation_recall": 1 / 5, "supported_share": 2 / 3, "abstention_recall": 2 / 3, "false_abstention": 2 / 5,
    }  # fmt: skip
    assert counts["abstained_answerable"] == counts["abstained_unanswerable"] == {"retrieval": 1, "model": 1}
    assert (counts["answered"], counts["citations"], counts["invalid_citations"], counts["checked_sentences"]) == (3, 3, 1, 3)


def test_shares_of_nothing_are_none() -> None:
    found = scores([query("Paris")], [answer("", [], ["right.txt"], [False], "model")])
    assert (found["exact_match"], found["citation_recall"], found["false_abstention"]) == (0, 0, 1)
    assert found["citation_precision"] is found["supported_share"] is found["abstention_recall"] is None


def test_the_same_questions_are_asked_again_without_their_paragraph(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_DATA", str(data))
    asked = queries(6, 4)
    assert asked == queries(6, 4)
    assert [q.question for q in asked[6:]] == [q.question for q in asked[:4]]
    assert [q.where for q in asked] == [None] * 6 + [f'not source = "{q.source}"' for q in asked[:4]]
    written = xquad.paragraphs()
    assert all(q.question in written[q.source.removesuffix(".txt")] and int(q.question.id[:-1]) >= 36 for q in asked)
    with pytest.raises(ConfigError, match="9 questions"):
        queries(2, 9)


def test_without_a_tuned_run_the_way_to_one_is_told(data: Path, tmp_path: Path) -> None:
    done = bench(data, LLMLAB_RUNS=str(tmp_path))
    assert done.returncode == 1 and "make finetune" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_answers_are_measured_through_the_gateway(data: Path, tuned_run: Run) -> None:
    done = bench(data, MODEL, "--run", tuned_run.id, "--questions", "6", "--unanswerable", "4")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (document["model"], document["run"]) == (MODEL, tuned_run.id)
    assert document["threshold"]["answerable"] == 72 and document["threshold"]["refused"] <= 0.02
    for kind in KINDS:
        found = document[kind]
        counts = found["counts"]
        refused, refused_rightly = counts["abstained_answerable"].values(), counts["abstained_unanswerable"].values()
        assert (counts["answerable"], counts["unanswerable"]) == (6, 4)
        assert counts["answered"] + sum(refused) == 6
        assert found["false_abstention"] == sum(refused) / 6 and found["abstention_recall"] == sum(refused_rightly) / 4
        assert counts["rightly_cited"] <= counts["right_citations"] <= counts["citations"]
        assert found["citation_recall"] == counts["rightly_cited"] / 6
        assert counts["supported_sentences"] <= counts["checked_sentences"]
        assert found["exact_match"] <= found["f1"] <= counts["answered"] / 6
        assert found["retrieval_hit_rate"] == 1
    retrieved = [[document[kind]["counts"][part]["retrieval"] for part in ("abstained_answerable", "abstained_unanswerable")]
                 for kind in KINDS]  # fmt: skip
    assert retrieved[0] == retrieved[1]
