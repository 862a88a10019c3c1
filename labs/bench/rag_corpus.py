"""A big corpus of real pages: the HTML documentation of Python, PostgreSQL and git as Debian packages it, and questions about it.

The pages are copied into the cache of the project and indexed there; the index stays, so a second run embeds only what has
changed. Half of the pages, by a hash of their names, is for choosing (`_dev`), half is held out (`_test`). How questions are
made is in labs.bench.rag_questions. Run as a part of: llmlab bench rag --corpus /usr/share/doc
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from labs.bench.rag_questions import KINDS, Posed, plain, posed
from labs.bench.rag_sets import Asked, Set, indexes_in
from pipelines.config import ROOT, load, named
from pipelines.errors import DataError
from pipelines.rag.index import RagConfig
from pipelines.rag.readers.section import one_line

if TYPE_CHECKING:
    from pipelines.rag.chunk import Chunk
    from pipelines.rag.generation import Progress
    from pipelines.rag.retrieve import Retriever

PACKAGES = {"python3.11-doc": "python3.11/html", "postgresql-doc-15": "postgresql-doc-15/html", "git-doc": "git-doc"}
GET_THEM = f"apt-get install {' '.join(PACKAGES)}"
DEFAULT_FOLDER = Path("/usr/share/doc")
EMBEDDER = "minilm-int8"  # if not told otherwise; minilm would take too long for so many passages
MOST_QUESTIONS, SAMPLE_SEED = 500, 13
PARTS = ("dev", "test")

_LISTS = re.compile(r"(genindex.*|py-modindex|contents|search|bookindex)\.html")  # made from the other pages
_HISTORY = re.compile(r"(whatsnew/.*|release(-[\d-]+)?)\.html")  # of features that are described where they belong


@dataclass(frozen=True)
class Corpus:
    """The sets of a corpus, and how it came to be.

    Attributes:
        sets: for each kind of question one to choose with and one that is held out.
        facts: pages, chunks, seconds of the sync, passages that it embedded, questions whose answer is in no single chunk.
    """

    sets: tuple[Set, ...]
    facts: Mapping[str, float | str]


def corpus_folder(asked: Path | None) -> Path | None:
    """Return the folder that holds the packages, None if none was named and the system has not all of them.

    Args:
        asked: the folder; else `LLMLAB_CORPUS` names it.

    Raises:
        DataError: the folder that was named lacks one.
    """
    wanted = asked or (Path(os.environ["LLMLAB_CORPUS"]) if os.environ.get("LLMLAB_CORPUS") else None)
    folder = wanted or DEFAULT_FOLDER
    lacking = [package for package, inside in PACKAGES.items() if not next((folder / inside).glob("*.html"), None)]
    if lacking and wanted:
        raise DataError(f"{folder} lacks the pages of {', '.join(lacking)}",
                        f"the folders {', '.join(PACKAGES.values())} in it, as below {DEFAULT_FOLDER}", GET_THEM)  # fmt: skip
    return None if lacking else folder


def cache_folder() -> Path:
    """Return the folder in which pages and index are kept."""
    return ROOT / ".cache" / "bench"


def read_corpus(folder: Path, kept: Path, embedder_name: str, progress: Progress) -> Corpus:
    """Copy the pages, bring the index up to date, and make the questions.

    Args:
        folder: holds the packages.
        kept: for pages and index.
        embedder_name: of the catalogue; each has an index of its own.
        progress: is told the steps.
    """
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import open_index, sync
    from pipelines.rag.retrieve import Retriever

    config = load(named("rag", "default"), RagConfig, [f"embedder={embedder_name}"])
    embedder = load_embedder(config.embedder)
    pages = _copied(folder, kept / "pages")
    with indexes_in(kept / "index"):
        name = f"docs-{embedder_name}"
        report = sync(kept / "pages", name, config, embedder, progress)
        retriever = Retriever(open_index(name, embedder), embedder, config)
    found = posed(_read(pages, kept / "pages", progress))
    sets, lost = _sets(found, retriever)
    facts: dict[str, float | str] = {
        "embedder": config.embedder, "vectors": report.vectors.kind, "pages": float(report.documents),
        "chunks": float(report.chunks), "sync_seconds": report.seconds, "embedded": float(report.change.to_embed),
        "questions_possible": float(len(found)), "answers_in_no_chunk": float(lost),
    }  # fmt: skip
    return Corpus(sets, facts)


def part_of(source: str) -> str:
    """Return the part that a page's questions belong to, one of `PARTS`."""
    return PARTS[hashlib.sha256(source.encode()).digest()[0] % len(PARTS)]


def _copied(folder: Path, target: Path) -> list[Path]:
    """Copy the pages of the packages, in place of what was copied before, and return them; `sync` follows no link."""
    shutil.rmtree(target, ignore_errors=True)
    copies = []
    for package, inside in PACKAGES.items():
        for page in sorted((folder / inside).rglob("*.html")):
            place = page.relative_to(folder / inside)
            if page.is_symlink() or _LISTS.fullmatch(place.name) or _HISTORY.fullmatch(place.as_posix()):
                continue
            copy = target / package / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, copy)
            copies.append(copy)
    return copies


def _read(pages: list[Path], root: Path, progress: Progress) -> Iterator[tuple[str, str]]:
    for done, page in enumerate(pages, 1):
        yield page.relative_to(root).as_posix(), page.read_text(encoding="utf-8", errors="replace")
        progress("make questions", done, len(pages))


def _sets(questions: list[Posed], retriever: Retriever) -> tuple[tuple[Set, ...], int]:
    """Return the sets, and how many questions have their answer in no chunk."""
    by_source: dict[str, list[Chunk]] = {}
    for chunk in retriever.index.chunks:
        by_source.setdefault(chunk.source, []).append(chunk)
    asked: dict[tuple[str, str], list[Asked]] = {(kind, part): [] for kind in KINDS for part in PARTS}
    lost = 0
    for source, some in groupby(sorted(questions, key=attrgetter("source")), key=attrgetter("source")):
        chunks = [(chunk, one_line(chunk.text)) for chunk in by_source.get(source, ())]
        for question in some:
            right = frozenset(_key(question.kind)(chunk) for chunk, text in chunks if _answers(question, chunk, text))
            lost += not right
            if right:
                asked[question.kind, part_of(source)].append(Asked(question.text, right))
    drawn = random.Random(SAMPLE_SEED)
    return tuple(
        Set(f"{kind}_{part}", retriever, tuple(drawn.sample(some, min(len(some), MOST_QUESTIONS))), _key(kind))
        for (kind, part), some in asked.items()
    ), lost


def _answers(question: Posed, chunk: Chunk, text: str) -> bool:
    return _heading(chunk) == question.mark if question.kind == "docs_headings" else question.mark in text


def _key(kind: str) -> Callable[[Chunk], str]:
    """Return by what a chunk is known: its section if a heading was asked about, else itself."""
    return (lambda chunk: f"{chunk.source}#{_heading(chunk)}") if kind == "docs_headings" else (lambda chunk: chunk.id)


def _heading(chunk: Chunk) -> str:
    return plain(chunk.title.rpartition(" > ")[2])
