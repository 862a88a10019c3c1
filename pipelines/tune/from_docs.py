"""A folder of documents -> a file of rows for the reader: questions about its chunks, with passages, answers and citations.

An engine writes the questions (pipelines.tune.questions); this module keeps what passes, and makes of each pair a row in the
form of service: its chunk and the nearest other ones, or, for a share of the pairs, only others, where the right reply is to
abstain. No passage but the cited one holds the answer's words; that another says it in other words is not found out.
Rows are appended as they are made. Beside them a journal tells which chunks are done, so the same command goes on. Run by:

    llmlab data from-docs path/to/folder --out notes.jsonl
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pipelines.errors import ConfigError, DataError
from pipelines.rag.answer import messages, reply_text
from pipelines.rag.chunk import Chunk, chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import Progress
from pipelines.rag.load import load
from pipelines.runs import disk_trouble_is_explained
from pipelines.tune import questions
from pipelines.tune.documents import folder_sha256
from pipelines.tune.rows import Message

Ask = Callable[[list[Message], dict[str, Any]], str]  # chat turns and the JSON schema of the reply -> the reply
Record = dict[str, Any]  # a row, or a line of the journal

FORM = 1  # of rows and journal, and of the rules that make them; raise it when they change
TRIES_PER_PAIR = 4  # a chunk from which nothing comes is left soon
NEXT = "llmlab data from-docs path/to/folder --out notes.jsonl"


@dataclass(frozen=True)
class Job:
    """What decides the rows.

    Attributes:
        docs: the folder of documents.
        out: the file of rows, .jsonl; its journal gets the same name and `.journal`.
        model: name of the served model, for the record.
        chunk_max_tokens: size of a chunk, title included, in the embedder's tokens.
        per_chunk: pairs to keep of a chunk, at most.
        distractors: passages beside the right one.
        abstain: share of the pairs whose chunk is withheld, 0..1.
        round_trip: whether the engine must find the answer again.
        seed: decides the order of chunks and passages, and which pairs abstain.
    """

    docs: Path
    out: Path
    model: str
    chunk_max_tokens: int
    per_chunk: int
    distractors: int
    abstain: float
    round_trip: bool
    seed: int


def make(
    job: Job, ask: Ask, embed: Callable[[], Embedder], limit: int | None = None, progress: Progress = lambda *_: None
) -> Record:
    """Write the rows of a folder, and return what came of it, all attempts together.

    Args:
        job: see there.
        ask: the engine.
        embed: loads what finds the chunks nearest to a question; called when nothing else can be refused.
        limit: at most so many chunks are asked about, a fair sample; the same command without it goes on with the others.
        progress: called with a stage ("embed", "ask"), units done, units in all.

    Raises:
        DataError: no readable document, or the file was begun by something else.
        ConfigError: the file cannot be written where it should.
        DiskFull, NotWritable: a write ran out of space, or is not allowed.
    """
    check_out(job.out, job.docs)
    try:
        documents, skipped = load(job.docs)
    except DataError as problem:
        raise DataError(problem.came, problem.expected, NEXT) from None
    with disk_trouble_is_explained(job.out), _opened(job) as journal:
        embedder = embed()
        chunks = [c for document in documents for c in chunk(document, job.chunk_max_tokens, embedder.token_count)]
        order = random.Random(job.seed).sample(chunks, len(chunks))[:limit]
        left = [c for c in order if c.id not in journal.done]
        library = _Library(chunks if left else [], embedder, progress)
        for number, asked in enumerate(left, len(order) - len(left) + 1):
            journal.add(asked.id, *_asked_about(asked, job, ask, library, journal.questions))
            progress("ask", number, len(order))
        return {"documents": len(documents), "skipped": len(skipped), "chunks": len(chunks), **journal.totals()}


def check_out(out: Path, docs: Path) -> None:
    """Raise `ConfigError` unless rows of these documents could be written to this path."""
    if out.suffix != ".jsonl" or out.is_dir():
        raise ConfigError(f"cannot write rows to {out}", "a file that ends with .jsonl", NEXT)
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist", "an existing folder", f"mkdir -p {out.parent}")
    if out.resolve().is_relative_to(docs.resolve()):
        raise ConfigError(f"{out} is inside {docs}, and would be read as a document", "a file elsewhere", NEXT)


class _Library:
    """All chunks, searched exhaustively for those nearest to a question."""

    def __init__(self, chunks: Sequence[Chunk], embedder: Embedder, progress: Progress) -> None:
        self._chunks, self._embedder = chunks, embedder
        self._vectors = embedder.embed([c.passage for c in chunks], lambda done, total: progress("embed", done, total))

    def nearest(self, question: str) -> list[Chunk]:
        """Return every chunk, the nearest to the question first."""
        scores = self._vectors @ self._embedder.embed_questions([question])[0]
        return [self._chunks[int(i)] for i in (-scores).argsort(kind="stable")]


def _asked_about(asked: Chunk, job: Job, ask: Ask, library: _Library, known: set[str]) -> tuple[list[Record], Counter[str]]:
    """Return the rows of a chunk, and why its other pairs were dropped."""
    rows, dropped = list[Record](), Counter[str]()
    found = questions.candidates(asked)
    for candidate in found[: job.per_chunk * TRIES_PER_PAIR]:
        request = questions.question_request(questions.document_title(asked), candidate)
        question = questions.reply_field(ask(*request), "question")
        reason = questions.fault(question, candidate, asked)
        near = [] if reason else library.nearest(question)
        if not reason and questions.plain(question) in known | {questions.plain(row["question"]) for row in rows}:
            reason = "question was asked before"
        elif not reason and asked not in near[: job.distractors + 1]:
            reason = "question leads to other chunks"
        elif not reason and job.round_trip:
            chosen = ask(*questions.choice_request(asked, question, [c.answer for c in found]))
            again = questions.reply_field(chosen, "answer")
            reason = None if questions.plain(again) == questions.plain(candidate.answer) else "engine answers something else"
        if reason:
            dropped[reason] += 1
        else:
            rows.append(_row(question, candidate.answer, asked, near, job))
        if len(rows) == job.per_chunk:
            break
    return rows, dropped


def _row(question: str, answer: str, right: Chunk, near: Sequence[Chunk], job: Job) -> Record:
    """Return a pair in the form of service, with where it comes from; the reader of files passes the other fields over."""
    rng = random.Random(f"{job.seed} {right.id} {question}")
    others = list(islice((c for c in near if c != right and not questions.holds(c.passage, answer)), job.distractors + 1))
    withheld = bool(others) and rng.random() < job.abstain
    passages = others if withheld else [right, *others[: job.distractors]]
    rng.shuffle(passages)
    reply = reply_text(answer, None if withheld else passages.index(right) + 1)
    return {"messages": [*messages(question, passages), {"role": "assistant", "content": reply}], "question": question,
            "answer": answer, "withheld": withheld, "source": right.source, "group": right.id}  # fmt: skip


class _Journal:
    """The file of rows and, beside it, one line for each chunk that is done, after a line with the settings."""

    def __init__(self, out: Path, stream: TextIO, done: Sequence[Record], rows: Sequence[Record]) -> None:
        self.out, self.stream = out, stream
        self.done = {line["chunk"]: line for line in done}
        self.questions = {questions.plain(row["question"]) for row in rows if "question" in row}

    def add(self, chunk_id: str, rows: Sequence[Record], dropped: Counter[str]) -> None:
        """Append the rows of a chunk, and then that it is done."""
        with self.out.open("a", encoding="utf-8") as stream:
            stream.write("".join(_line(row) for row in rows))
        done = {"chunk": chunk_id, "kept": len(rows), "abstentions": sum(row["withheld"] for row in rows), "dropped": dropped}
        self.stream.write(_line(done))
        self.stream.flush()
        self.done[chunk_id] = done
        self.questions |= {questions.plain(row["question"]) for row in rows}

    def totals(self) -> Record:
        """Return the counts of every chunk that is done."""
        dropped = sum((Counter(line["dropped"]) for line in self.done.values()), Counter[str]())
        kept, abstentions = (sum(line[key] for line in self.done.values()) for key in ("kept", "abstentions"))
        return {"chunks_done": len(self.done), "asked": kept + dropped.total(), "kept": kept, "abstentions": abstentions,
                "dropped": dict(dropped.most_common())}  # fmt: skip


@contextmanager
def _opened(job: Job) -> Iterator[_Journal]:
    """Open rows and journal for one process; the system lets go of the lock when the process ends, however it ends."""
    import fcntl

    out, path, settings = job.out, job.out.with_name(job.out.name + ".journal"), _settings(job)
    if out.exists() and not path.exists():
        raise DataError(f"{out} exists, and this command has not begun it", f"a new file, or {path.name} beside it",
                        "--out another.jsonl")  # fmt: skip
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process writes {out}", "one at a time", "wait for it, or --out another.jsonl") from None
        begun, *done = (_lines(path) if out.exists() else []) or [settings]
        different = [key for key in settings if begun.get(key) != settings[key]]
        if different:
            now = ", ".join(f"{key} ({begun.get(key)} then, {settings[key]} now)" for key in different)
            raise DataError(f"{out} was begun with other {now}", "the same documents and options, or another file",
                            f"--out another.jsonl, or rm {out} {path}")  # fmt: skip
        known = {line.get("chunk") for line in done}
        rows = _lines(out, lambda row: row.get("group", "") in known | {""}) if out.exists() else []
        if not out.exists():
            stream.truncate(0)
            stream.write(_line(settings))
            stream.flush()
            out.touch()
        yield _Journal(out, stream, done, rows)


def _settings(job: Job) -> Record:
    options = ("model", "chunk_max_tokens", "per_chunk", "distractors", "abstain", "round_trip", "seed")
    return {"form": FORM, "documents": folder_sha256(job.docs)[:16]} | {name: getattr(job, name) for name in options}


def _lines(path: Path, wanted: Callable[[Record], bool] = lambda _: True) -> list[Record]:
    """Return the objects of a file, and cut off its end what an interruption left: half a line, lines that are not wanted."""
    raw = path.read_bytes()
    lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        found = [dict(json.loads(line).items()) for line in lines]
    except (ValueError, AttributeError):
        lost = DataError(f"{path} holds a line that is no JSON object", "the lines that this command wrote", f"rm {path}")
        raise lost from None
    while found and not wanted(found[-1]):
        del found[-1], lines[-1]
    os.truncate(path, sum(map(len, lines)))
    return found


def _line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
