"""Makes and changes one small index, and kills that at every event: python index_driver.py ROOT POINTS

Each attempt is a fork. An event is a file operation below ROOT, a flush to disk, a rename, or a step that the sync tells of.
For "build" there is no index before, for "sync" there is one whose documents then change. After each kill the index must
open in the old or in the new state, or not exist if it never did, and the next sync must end in the new state and leave
nothing behind. Prints one line of JSON: points and how many were found in which state.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s  # noqa: F401 - imported before the fork, as all that follows
import faiss  # noqa: F401
import Stemmer  # noqa: F401

from pipelines.config import load, named
from pipelines.errors import UnknownName
from pipelines.rag import generation, lexical, vectors  # noqa: F401
from pipelines.rag.index import RagConfig, open_index, sync
from tests.pipelines.rag.conftest import HashEmbedder

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
CONFIG = load(named("rag", "default"), RagConfig, ["chunk_max_tokens=48"])
NAME, DOCUMENTS = "lab", 60


def write_documents(docs: Path, *, changed: bool) -> None:
    shutil.rmtree(docs, ignore_errors=True)
    docs.mkdir(parents=True)
    for n in range(DOCUMENTS):
        if not (changed and n % 7 == 0):
            text = f"# Page {n}\n\nThe text of page {n}{' is another one now' if changed and n % 5 == 0 else ''}.\n"
            (docs / f"page-{n:02}.md").write_text(text)
    if changed:
        (docs / "new.md").write_text("# New\n\nA new page.\n")


def in_child(work: Callable[[], object], kill_at: int | None = None) -> int:
    """Run `work` in a fork that dies at an event; return the number of events, or -1 if it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        count = 0

        def event(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            if name in FILE_EVENTS and str(arguments[0]).startswith(os.environ["LLMLAB_INDEX"]):
                event()

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments, **settings: (event(), function(*arguments, **settings))[1]

        sys.addaudithook(audit)
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        globals()["on_progress"] = event
        work()
        os.write(writing, str(count).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.waitstatus_to_exitcode(status) == 0
    return int(said)


def on_progress(*_: object) -> None:
    """Replaced in the child."""


def make(docs: Path) -> None:
    sync(docs, NAME, CONFIG, HashEmbedder(), lambda *step: on_progress(*step))


def state() -> frozenset[str] | None:
    try:
        return frozenset(c.text for c in open_index(NAME, HashEmbedder()).chunks)
    except UnknownName:
        return None


def main(root: Path, points: int) -> None:
    docs, kept = root / "docs", root / "kept"
    os.environ["LLMLAB_INDEX"] = str(root / "index")
    folder = generation.folder_of(NAME)
    found: Counter[str] = Counter()
    for kind in ("build", "sync"):
        shutil.rmtree(root / "index", ignore_errors=True)
        write_documents(docs, changed=False)
        if kind == "sync":
            for _ in range(2):
                make(docs)
            write_documents(docs, changed=True)
        shutil.rmtree(kept, ignore_errors=True)
        (root / "index").mkdir(exist_ok=True)
        shutil.copytree(root / "index", kept)
        old = state()
        events = in_child(lambda: make(docs))
        new = state()
        assert old != new and new
        for point in sorted({1 + round(i * (events - 1) / (points // 2 - 1)) for i in range(points // 2)}):
            shutil.rmtree(root / "index")
            shutil.copytree(kept, root / "index")
            assert in_child(lambda: make(docs), kill_at=point) == -1, (kind, point, events)
            after = state()
            assert after in (old, new), (kind, point)
            found[f"{kind}: {'new' if after == new else 'old'}"] += 1
            make(docs)
            assert state() == new, (kind, point)
            left = [p for p in folder.iterdir() if p.is_dir()]
            assert 1 <= len(left) <= 2 and all((p / generation.MANIFEST).exists() for p in left), (kind, point, left)
    print(json.dumps({"points": sum(found.values()), "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
