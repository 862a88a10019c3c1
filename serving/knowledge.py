"""The index that the gateway searches, opened once; without one the gateway serves everything but retrieval.

It reads the generation that was current when it was opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from monitoring.metrics import INDEX_CHUNKS, INDEX_CREATED
from pipelines.config import load, named
from pipelines.errors import EngineError, LabError
from pipelines.rag.index import RagConfig, open_index

if TYPE_CHECKING:
    from pipelines.rag.retrieve import Retrieved, Retriever


class IndexMissing(EngineError):
    """There is no index that could be searched; the rest of the gateway works."""


@dataclass(frozen=True)
class Knowledge:
    """An open index, or the problem that kept it from opening.

    Attributes:
        name: the index.
        top_k: passages for a question that does not say how many.
        retriever: None if the index could not be opened.
        problem: why not.
    """

    name: str
    top_k: int
    retriever: Retriever | None
    problem: LabError | None

    @property
    def summary(self) -> str:
        """Return one line for the user."""
        if self.problem or not self.retriever:
            reason, way_on = (self.problem.came, self.problem.next_command) if self.problem else ("", "")
            return f"none: {reason}; /v1/rag/query answers 503 until: {way_on}"
        index = self.retriever.index
        return f"{self.name}, {len(index)} chunks, generation {index.generation}"

    async def retrieve(self, question: str, k: int) -> Retrieved:
        """Return the passages for a question; the search runs in a thread.

        Raises:
            IndexMissing: there is no index; says the command that makes one.
            DataError: the question is longer than the embedder reads.
        """
        from starlette.concurrency import run_in_threadpool

        return await run_in_threadpool(self.require().retrieve, question, k)

    def require(self) -> Retriever:
        """Return the retriever; `IndexMissing` if there is none."""
        if self.retriever is None:
            problem = self.problem or LabError(f"index {self.name!r} is not open")
            raise IndexMissing(problem.came, problem.expected, f"{problem.next_command or 'make index'}, then start serve again")
        return self.retriever


def open_knowledge(name: str, rag: str) -> Knowledge:
    """Open an index with the embedder that configs/rag/<rag>.yaml names; a problem with it is kept, not raised.

    Raises:
        ConfigError: the rag file does not fit.
    """
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.retrieve import Retriever

    config = load(named("rag", rag), RagConfig)
    try:
        embedder = load_embedder(config.embedder)
        retriever = Retriever(open_index(name, embedder), embedder, config)
    except LabError as problem:
        return _announced(Knowledge(name, config.top_k, None, problem))
    return _announced(Knowledge(name, config.top_k, retriever, None))


def _announced(knowledge: Knowledge) -> Knowledge:
    index = knowledge.retriever.index if knowledge.retriever else None
    INDEX_CHUNKS.set(len(index) if index else 0)
    INDEX_CREATED.set(datetime.fromisoformat(index.created).timestamp() if index else 0)
    return knowledge
