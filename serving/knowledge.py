"""The index that the gateway searches; without one the gateway serves everything but retrieval.

A generation that is written while it runs is opened beside the one in use and takes its place; questions in between are
answered from the old one.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.metrics import set_index
from pipelines.config import load, named
from pipelines.errors import EngineError, LabError
from pipelines.rag import abstention, embedders, generation
from pipelines.rag.index import RagConfig
from pipelines.rag.stores.contract import StoreError

if TYPE_CHECKING:
    from pipelines.rag.embed import Embedder
    from pipelines.rag.retrieve import Retrieved, Retriever

LOOK_SECONDS = 1.0  # between two looks for a new generation


class IndexMissing(EngineError):
    """There is no index that could be searched; the rest of the gateway works."""


class Knowledge:
    """An open index, or the problem that kept it from opening; safe to use from several threads.

    Args:
        name: the index.
        config: how it is searched.

    Attributes:
        folder: of the index.
        top_k: passages for a question that does not say how many.
        retriever: None if the index could not be opened.
        problem: why not, or why a newer generation could not be.
    """

    def __init__(self, name: str, config: RagConfig) -> None:
        self.name, self.config, self.top_k = name, config, config.top_k
        self.folder = generation.folder_of(name)
        self.retriever: Retriever | None = None
        self.problem: LabError | None = None
        self._embedder: Embedder | None = None
        self._seen: tuple[str | None, int | None] | None = None
        self._looked = 0.0
        self._renewing, self._loading = threading.Lock(), threading.Lock()
        self._open()

    @property
    def summary(self) -> str:
        """Return one line for the user."""
        reason, way_on = (self.problem.came, self.problem.next_command) if self.problem else ("", "")
        if not self.retriever:
            return f"none: {reason}; /v1/rag/query answers 503 until: {way_on}"
        index = self.retriever.index
        newer = f"; a newer one cannot be opened: {reason}; next: {way_on}" if reason else ""
        return f"{self.name}, {len(index)} chunks, generation {index.generation}{newer}"

    @property
    def embedder_name(self) -> str:
        """Return the name of the index's embedder, in its catalogue."""
        return self.config.embedder

    @property
    def embedder_passport(self) -> dict[str, Any]:
        """Return where the embedder comes from and what it reads."""
        entry = embedders.find(self.config.embedder)
        return {"embedder": entry.name, "dimensions": entry.dimension, "max_tokens": entry.max_tokens, "licence": entry.licence,
                "weights": entry.weights.model_dump()}  # fmt: skip

    def embedder(self) -> Embedder:
        """Return the index's embedder, which works without an index too; `WeightsMissing` if it cannot be loaded."""
        return self._loaded_embedder()

    async def retrieve(self, question: str, k: int, where: str | None = None) -> Retrieved:
        """Return the passages for a question, of the chunks that `where` matches; the search runs in a thread.

        Raises:
            IndexMissing: there is no index; says the command that makes one.
            DataError: the question is longer than the embedder reads, or the expression cannot be read.
        """
        from starlette.concurrency import run_in_threadpool

        return await run_in_threadpool(self.require().retrieve, question, k, where)

    async def check(self, answer: str, found: Retrieved) -> list[dict[str, Any]]:
        """Return the sentences of an answer with what they cite and whether that holds them; see pipelines.rag.support."""
        from starlette.concurrency import run_in_threadpool

        from pipelines.rag.support import check

        checked = await run_in_threadpool(check, answer, found.hits, found.retriever)
        return [{"text": s.text, "citations": list(s.cited), "supported": s.supported} for s in checked]

    def require(self) -> Retriever:
        """Return the retriever; `IndexMissing` if there is none."""
        self.look()
        if self.retriever is None:
            problem = self.problem or LabError(f"index {self.name!r} is not open")
            raise IndexMissing(problem.came, problem.expected, problem.next_command or generation.AGAIN)
        return self.retriever

    def sync(self, docs: Path | None) -> None:
        """Make the index say what a folder and the uploads say (pipelines.rag.index.sync), and serve that.

        Raises:
            Busy: another process builds the index.
            LabError: as pipelines.rag.index.sync; what served goes on serving.
        """
        from pipelines.rag.index import sync
        from pipelines.rag.uploads import NoDocuments

        try:
            sync(docs, self.name, self.config, self._loaded_embedder())
        except NoDocuments:
            self.forget()
        with self._renewing:
            self._open()

    def forget(self) -> None:
        """Remove the index; questions are answered with 503 until there is one again."""
        with generation.only_writer(self.folder):
            generation.forget(self.folder)
        with self._renewing:
            self._open()

    def look(self) -> None:
        """See now and then whether another generation serves, or a store holds it now; open it in a thread of its own."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        waiting = isinstance(self.problem, StoreError)  # for a copy to the store, or for the store itself
        newer = waiting or self._state() != self._seen
        if newer and self._renewing.acquire(blocking=False):
            threading.Thread(target=self._renew, name="index-renewal", daemon=True).start()

    def _state(self) -> tuple[str | None, int | None]:
        """Return which generation serves and when its threshold was learned, which tells whether to open it anew."""
        return generation.current(self.folder), abstention.learned_at(self.name)

    def _renew(self) -> None:
        try:
            self._open()
        finally:
            self._renewing.release()

    def _loaded_embedder(self) -> Embedder:
        from pipelines.rag.embed import load_embedder

        with self._loading:
            self._embedder = self._embedder or load_embedder(self.config.embedder)
            return self._embedder

    def _open(self) -> None:
        from pipelines.rag.retrieve import open_retriever

        self._seen = self._state()
        if self._seen[0] is None:
            self.retriever = None  # an index that was removed is not served any more
        try:
            embedder = self._loaded_embedder()
            reranker = self.retriever.reranker if self.retriever else None
            self.retriever = open_retriever(self.name, embedder, self.config, reranker)
            self.problem = None
        except LabError as problem:
            self.problem = problem  # the generation before, if there is one, goes on serving
        index = self.retriever.index if self.retriever else None
        if index:
            created = datetime.fromisoformat(index.created).timestamp()
            set_index(self.name, index.generation, self.config.embedder, len(index), created)
        else:
            set_index(self.name, "", self.config.embedder, 0, 0)


def open_knowledge(name: str, rag: str) -> Knowledge:
    """Open an index as configs/rag/<rag>.yaml says; a problem with it is kept, not raised.

    Raises:
        ConfigError: the rag file does not fit, or the name is not valid.
    """
    return Knowledge(name, load(named("rag", rag), RagConfig))
