"""The index behind the gateway while it is synced: no question fails, and the new generation takes over by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import load, named
from pipelines.rag import generation
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, sync
from serving import knowledge
from serving.knowledge import IndexMissing, Knowledge, open_knowledge
from tests.serving.conftest import PAGES

CONFIG = load(named("rag", "default"), RagConfig)


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMLAB_INDEX", str(tmp_path / "index"))
    monkeypatch.setattr(knowledge, "LOOK_SECONDS", 0.05)
    (tmp_path / "docs").mkdir()
    for name, text in PAGES.items():
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return tmp_path / "docs"


def synced(docs: Path) -> str:
    return sync(docs, "lab", CONFIG, load_embedder(CONFIG.embedder)).generation


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def found(opened: Knowledge, text: str) -> bool:
    return any(text in hit.text for hit in opened.require().retrieve("How many moons has Barsoom?", 3).hits)


def test_questions_go_on_through_a_sync_and_the_new_text_is_found(docs: Path) -> None:
    first = synced(docs)
    opened = open_knowledge("lab", "default")
    errors: list[Exception] = []
    seen: set[str] = set()
    going = threading.Event()

    def ask() -> None:
        while not going.is_set():
            try:
                retriever = opened.require()
                assert retriever.retrieve("Who made it?", 2).hits
                seen.add(retriever.index.generation)
            except Exception as error:
                errors.append(error)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    made = [first]
    for n in range(3):
        (docs / "barsoom.md").write_text(f"# Barsoom\n\nBarsoom has {n + 2} moons.\n", encoding="utf-8")
        made.append(synced(docs))
        until(lambda: made[-1] in seen)
    going.set()
    for asker in askers:
        asker.join()
    assert errors == [] and seen >= {made[0], made[-1]}
    assert found(opened, "4 moons") and not found(opened, "3 moons")


def test_an_index_that_is_made_later_is_picked_up(docs: Path) -> None:
    opened = open_knowledge("lab", "default")
    with pytest.raises(IndexMissing, match="there is no index named 'lab'") as raised:
        opened.require()
    assert "make index" in raised.value.next_command and opened.summary.startswith("none: there is no index")
    synced(docs)

    def is_there() -> bool:
        try:
            return bool(opened.require())
        except IndexMissing:
            return False

    until(is_there)
    assert opened.problem is None


def test_a_damaged_generation_does_not_take_over(docs: Path) -> None:
    first = synced(docs)
    opened = open_knowledge("lab", "default")
    (docs / "more.md").write_text("# More\n\nMore text.\n", encoding="utf-8")
    folder = generation.folder_of("lab")
    second = synced(docs)
    (folder / generation.CURRENT).write_text(first + "\n")
    until(lambda: opened.require().index.generation == first)
    (folder / second / "vectors.npy").write_bytes(b"nothing")
    (folder / generation.CURRENT).write_text(second + "\n")
    until(lambda: bool(opened.require()) and opened.problem is not None)
    assert opened.require().index.generation == first
    assert "not the file that was recorded" in opened.summary and first in opened.summary
