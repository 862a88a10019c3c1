"""Rows from documents: what is asked for, which pairs are dropped, what a row holds, and that an interruption costs nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ConfigError, DataError, LabError
from pipelines.rag.answer import ABSTENTION, SYSTEM, parse
from pipelines.rag.chunk import Chunk
from pipelines.tune import from_docs, questions
from pipelines.tune.files import read_rows
from pipelines.tune.from_docs import Job, make
from pipelines.tune.report import report

PAGES = {
    "vela.md": "# Vela\n\nVela was released in May 2022. It was written by Orion Labs and has 9 billion parameters.\n",
    "kite.md": "# Kite\n\nKite is a vector database that runs on one machine. Kite stores 4 million vectors.\n",
    "deep/tern.md": "# Tern\n\nTern was released in June 2021. Tern draws charts because numbers are hard to read.\n",
    "orchard.txt": "The new gate cost 95 pounds. The pears failed because frost killed the blossom. Anna Berg keeps the keys.\n",
}
QUESTIONS = {
    "Vela was released when.": "When was Vela released?",
    "It was written by who.": "Vela was written by whom by who?",
    "It was written by Orion Labs and has how many parameters.": "How many parameters does Vela have?",
    "Kite is what.": "What is Kite?",
    "Kite stores how many vectors.": "How many vectors does Kite store?",
    "Tern was released when.": "When was Tern released?",
    "Tern draws charts because why.": "Why does Tern draw charts?",
    "The new gate cost how much.": "How much did the new gate cost?",
    "The pears failed because why.": "Why did the pears fail?",
}


class Engine:
    """A deterministic engine: knows the question to a statement and the answer to a question; may be interrupted."""

    def __init__(self, answers: dict[str, str] | None = None, calls: int = 10**6) -> None:
        self.answers, self.calls, self.asked = answers or {}, calls, list[str]()

    def __call__(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> str:
        if len(self.asked) == self.calls:
            raise KeyboardInterrupt
        last = messages[-1]["content"]
        self.asked.append(last)
        ((field, form),) = schema["properties"].items()
        if field == "question":
            question = QUESTIONS.get(last.partition(": ")[2], "Not one.")
            return json.dumps({field: question})
        question = last.rpartition("Question: ")[2]
        return json.dumps({field: self.answers.get(question, self._truth(question, form["enum"]))})

    @staticmethod
    def _truth(question: str, choices: list[str]) -> str:
        known = {"When": r"\d{4}", "How": "parameters|vectors|pounds", "What": "^a ", "Why": "killed|are"}
        return next(c for c in choices if re.search(known[question.split()[0]], c))


class Words:
    """An embedder that counts words: texts with words in common are near."""

    fingerprint, dimension, max_tokens = "w" * 64, 512, 10_000

    def token_count(self, text: str, *, question: bool = False) -> int:  # noqa: ARG002 - no prefix
        return len(text.split()) + 2

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(texts)

    def embed(self, texts: Sequence[str], on_progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        rows = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[sum(map(ord, word)) * 31 % self.dimension] += 1
            row /= np.linalg.norm(row) or 1
        if on_progress:
            on_progress(len(texts), len(texts))
        return rows


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for name, text in PAGES.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return Job(tmp_path / "docs", tmp_path / "rows.jsonl", "some-model", 96, 2, 2, 0.0, True, 0)


def rows_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.out.read_text(encoding="utf-8").splitlines()]


def piece(text: str, title: str = "Vela > Facts") -> Chunk:
    return Chunk("0" * 16, "a.md", title, text, 0, len(text))


@pytest.mark.parametrize(
    ("sentence", "answer", "statement", "opening"),
    [
        ("The gate was painted on 3 May 2021 by a friend.", "3 May 2021", "The gate was painted when by a friend.", "When"),
        ("It is turned off from November to March.", "November to March", "It is turned off from when.", "When"),
        ("The part cost 87 pounds and the labour more.", "87 pounds", "The part cost how much and the labour more.", "How much"),
        ("The model reads 32K tokens, and is fast.", "32K tokens", "The model reads how many tokens.", "How many tokens"),
        (
            "Two butts hold 1,400.5 litres together.",
            "1,400.5 litres",
            "Two butts hold how many litres together.",
            "How many litres",
        ),
        ("It was made by Orion Labs for a bank.", "Orion Labs", "It was made by who for a bank.", "Who"),
        ("The secretary is Margaret Oduya, who lives near.", "Margaret Oduya", "The secretary is what.", "What"),
        ("Dr Helen Pryce will lead the move.", "Dr Helen Pryce", "Who will lead the move.", "Who"),
        ("They met at Harrow Lane in spring.", "Harrow Lane", "They met where in spring.", "Where"),
        ("It lapses because nobody came to look.", "nobody came to look", "It lapses because why.", "Why"),
        ("Kite is a vector database (fast).", "a vector database", "Kite is what (fast).", "What is"),
    ],
)
def test_answers_are_found_by_rule(sentence: str, answer: str, statement: str, opening: str) -> None:
    found = {c.answer: c for c in questions.candidates(piece(sentence))}
    assert answer in found, list(found)
    assert (found[answer].statement, found[answer].openings[0]) == (statement, opening)


@pytest.mark.parametrize(
    "text",
    [
        "We took over plot 14 at the gate.",
        "It works with GPT-4 and with Claude 2 today.",
        "The library is moved last of all.",
        "It runs on the OpenAI platform of today.",
        "Vela was shown to many people.",
        "| 12 May | 40 pounds | Orion Labs |",
        "see https://example.org from 12 May 2020.",
    ],
)
def test_nothing_is_asked_about_what_states_no_fact(text: str) -> None:
    assert questions.candidates(piece(text)) == []


def test_kinds_take_turns() -> None:
    text = "It opened in May 2020. It closed in June 2021. The gate cost 40 pounds. The fence cost 90 pounds."
    assert [c.answer for c in questions.candidates(piece(text))] == ["May 2020", "40 pounds", "June 2021", "90 pounds"]


CHUNK = piece("Vela was released in May 2022 by Orion Labs. It has 9 billion parameters.")
MAY, LABS, SIZE = (next(c for c in questions.candidates(CHUNK) if c.answer == a)
                   for a in ("May 2022", "Orion Labs", "9 billion parameters"))  # fmt: skip


@pytest.mark.parametrize(
    ("question", "candidate", "reason"),
    [
        ("When was Vela released by Orion Labs?", MAY, None),
        ("Who released Vela?", LABS, None),
        ("How many parameters does Vela have?", SIZE, None),
        ("Vela was released.", MAY, "not a question"),
        ("", MAY, "not a question"),
        ("Vela was released by whom in what?", LABS, "not a question"),
        ("When was Vela released?", replace(MAY, answer="June 2022"), "answer not in its chunk"),
        ("When was Vela released?", replace(MAY, answer="May 202"), "answer not in its chunk"),
        ("When was Vela released?", replace(MAY, answer=CHUNK.text.upper()), "answer is the whole chunk"),
        ("When in may of 2022 was Vela released?", MAY, "question holds the answer"),
        ("When was it released?", MAY, "question does not say about what"),
        ("When was Vela released by Vela?", MAY, "question repeats itself"),
        ("When was Vela sold in London?", MAY, "question has words from elsewhere"),
        ("When was Vela?", MAY, "question is beside its sentence"),
    ],
)
def test_faults_of_a_pair(question: str, candidate: questions.Candidate, reason: str | None) -> None:
    assert questions.fault(question, candidate, CHUNK) == reason


def test_normalised_answers_are_found_as_whole_words() -> None:
    assert questions.holds("It cost 62\n  Pounds, or so.", "(62 pounds)")
    assert not questions.holds("It cost 162 pounds.", "62 pounds") and not questions.holds("anything", " .")


def test_rows_are_what_a_reader_is_asked_in_service(job: Job, tokenizer: Any) -> None:
    made = make(job, Engine(), Words)
    rows = rows_of(job)
    assert made["kept"] == len(rows) == 8 and made["abstentions"] == 0
    assert made["documents"] == 4 and made["chunks"] == made["chunks_done"] == 4
    for row in rows:
        system, user, assistant = row["messages"]
        passages = re.findall(r"^\[(\d)\] (.*)$", user["content"], re.M)
        reply = parse(assistant["content"], len(passages))
        assert system == {"role": "system", "content": SYSTEM} and user["content"].endswith(f"\n\nQuestion: {row['question']}")
        assert len(passages) == 3 and reply.text == row["answer"] and not reply.invalid
        assert [int(n) for n, text in passages if questions.holds(text, row["answer"])] == list(reply.cited)
        assert questions.holds(PAGES[row["source"]], row["answer"])
    assert {row["messages"][2]["content"][-3:] for row in rows} > {"[1]", "[3]"}, "the right passage has no fixed place"
    found = report(read_rows(job.out), tokenizer, 1024)
    assert (found.rows, found.silent, found.endless, found.too_long, found.copies) == (8, [], [], [], [])


def test_a_withheld_passage_makes_the_reply_an_abstention(job: Job) -> None:
    every = replace(job, abstain=1.0)
    assert make(every, Engine(), Words)["abstentions"] == 8
    for row in rows_of(every):
        assert row["withheld"] and row["messages"][2]["content"] == ABSTENTION
        passages = row["messages"][1]["content"].split("\n\nQuestion: ")[0]
        assert len(passages.splitlines()) >= 2 and not questions.holds(passages, row["answer"])
    some = replace(job, abstain=0.5, out=job.out.with_name("some.jsonl"))
    assert 0 < make(some, Engine(), Words)["abstentions"] < 8


def test_passages_that_hold_the_answer_too_are_no_distractors(job: Job) -> None:
    (job.docs / "copy.md").write_text("# Vela again\n\nVela came out in May 2022, they say.\n", encoding="utf-8")
    make(job, Engine(), Words)
    row = next(row for row in rows_of(job) if row["question"] == "When was Vela released?")
    assert "they say" not in row["messages"][1]["content"]


def test_each_check_is_counted(job: Job) -> None:
    (job.docs / "zeta.md").write_text("# Vela\n\nVela was released in July 2024.\n", encoding="utf-8")
    lost = Engine({"How many vectors does Kite store?": "a vector database", "Why did the pears fail?": "95 pounds"})
    three = replace(job, distractors=0, per_chunk=3)
    made = make(three, lost, Words)
    assert made["dropped"]["engine answers something else"] == 2
    assert made["dropped"]["question leads to other chunks"] + made["dropped"].get("question was asked before", 0) >= 1
    assert made["dropped"]["not a question"] == 1
    assert made["asked"] == made["kept"] + sum(made["dropped"].values())
    assert made["kept"] == len(rows_of(job))
    trusting = replace(three, round_trip=False, out=job.out.with_name("trusting.jsonl"))
    engine = Engine()
    assert make(trusting, engine, Words)["kept"] == made["kept"] + 2
    assert not any("Question: " in asked for asked in engine.asked)


def test_a_question_is_kept_once(job: Job) -> None:
    (job.docs / "zeta.md").write_text("# Vela\n\nVela was released in July 2024.\n", encoding="utf-8")
    made = make(replace(job, round_trip=False), Engine(), Words)
    assert made["dropped"]["question was asked before"] == 1
    assert len({row["question"] for row in rows_of(job)}) == made["kept"]
    again = replace(job, round_trip=False, out=job.out.with_name("again.jsonl"))
    for limit in range(1, 6):  # each time it has to know the questions of the times before
        made_again = make(again, Engine(), Words, limit=limit)
    assert made_again == made and again.out.read_bytes() == job.out.read_bytes()


def test_no_more_is_kept_of_a_chunk_than_asked_for(job: Job) -> None:
    make(replace(job, per_chunk=1), Engine(), Words)
    assert [row["source"] for row in sorted(rows_of(job), key=lambda row: row["source"])] == sorted(PAGES)


def test_a_limit_takes_a_sample_and_not_the_first_chunks(job: Job) -> None:
    first = set()
    for seed in range(6):
        one = replace(job, seed=seed, out=job.out.with_name(f"{seed}.jsonl"))
        make(one, Engine(), Words, limit=1)
        first |= {row["source"] for row in rows_of(one)}
    assert len(first) > 1


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_order(job: Job) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        one = replace(job, seed=seed, out=job.out.with_name(f"{name}.jsonl"), abstain=0.3)
        make(one, Engine(), Words)
        texts.append(one.out.read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("calls", range(1, 15, 2))
def test_an_interrupted_file_is_gone_on_with_to_the_byte(job: Job, calls: int) -> None:
    whole, engine = replace(job, out=job.out.with_name("whole.jsonl")), Engine()
    expected = make(whole, engine, Words)
    first, second = Engine(calls=calls), Engine()
    with pytest.raises(KeyboardInterrupt):
        make(job, first, Words)
    done = job.out.with_name("rows.jsonl.journal").read_text().count('"kept"')
    with job.out.open("a") as rows, job.out.with_name("rows.jsonl.journal").open("a") as journal:
        rows.write('{"messages": [], "group": "of no finished chunk", "question": "?"}\n{"half a l')
        journal.write('{"chunk": "half')
    assert make(job, second, Words) == expected
    assert job.out.read_bytes() == whole.out.read_bytes()
    assert len(second.asked) <= len(engine.asked) - done and len(first.asked) + len(second.asked) <= len(engine.asked) + 5


def test_a_finished_file_asks_nothing_and_a_limit_is_a_beginning(job: Job) -> None:
    assert make(job, Engine(), Words, limit=2)["chunks_done"] == 2
    begun = job.out.read_text()
    made = make(job, Engine(), Words)
    assert made["chunks_done"] == 4 and job.out.read_text().startswith(begun)
    assert make(job, Engine(calls=0), Words) == made


def test_rows_that_a_user_deleted_or_added_are_left_alone(job: Job) -> None:
    make(job, Engine(), Words, limit=2)
    kept = job.out.read_text().splitlines(keepends=True)[1:]
    own = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]}\n'
    job.out.write_text("".join([*kept, own]))
    make(job, Engine(), Words)
    assert job.out.read_text().startswith("".join([*kept, own]))


def refused(kind: type[LabError], match: str, job: Job) -> None:
    engine = Engine()
    with pytest.raises(kind, match=match):
        make(job, engine, Words)
    assert engine.asked == []


def test_a_file_of_something_else_is_refused(job: Job) -> None:
    make(job, Engine(), Words)
    before = job.out.read_bytes()
    refused(DataError, r"begun with other seed \(0 then, 1 now\)(.|\n)*--out another.jsonl", replace(job, seed=1))
    refused(DataError, r"other model \(some-model then, another now\), abstain", replace(job, model="another", abstain=0.4))
    (job.docs / "kite.md").write_text("# Kite\n\nChanged.\n")
    refused(DataError, "begun with other documents", job)
    assert job.out.read_bytes() == before
    job.out.with_name("rows.jsonl.journal").unlink()
    refused(DataError, "rows.jsonl exists, and this command has not begun it", job)
    job.out.unlink()
    assert make(job, Engine(), Words)["kept"] > 0


def test_what_cannot_be_read_or_written_is_refused(job: Job, tmp_path: Path) -> None:
    refused(ConfigError, r"ends with \.jsonl", replace(job, out=tmp_path / "rows.csv"))
    refused(ConfigError, "would be read as a document", replace(job, out=job.docs / "rows.jsonl"))
    refused(ConfigError, "mkdir -p .*nowhere", replace(job, out=tmp_path / "nowhere" / "rows.jsonl"))
    refused(DataError, "does not exist(.|\n)*next: +llmlab data from-docs", replace(job, docs=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused(DataError, "holds no readable document", replace(job, docs=tmp_path / "empty"))
    (tmp_path / "empty" / "photo.jpg").write_bytes(b"\xff")
    refused(DataError, r"holds no readable document \(1 skipped\)", replace(job, docs=tmp_path / "empty"))
    assert not job.out.exists()
    with from_docs._opened(job):
        refused(DataError, "another process writes", job)
    job.out.with_name("rows.jsonl.journal").write_text("[1]\n")
    refused(DataError, "holds a line that is no JSON object", job)
