"""Who reads, cuts and embeds the documents of a sync: this process here, or many (pipelines.rag.scale); what comes is the same.

What is new is not decided here, and nothing is written. Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipelines.rag.chunk import Chunk, chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import Progress
from pipelines.rag.load import File, Skipped, read

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Cut:
    """A document that was read and cut.

    Attributes:
        source: as of the `File`.
        sha256: of the file.
        chunks: in reading order; None if the file is as it was, so that the chunks before are its chunks.
    """

    source: str
    sha256: str
    chunks: tuple[Chunk, ...] | None = None


class Workers(Protocol):
    """Who does the work of a sync that grows with the documents."""

    def cut(self, files: Sequence[File], max_tokens: int, report: Progress) -> list[Cut | Skipped]:
        """Return each file as `cut` returns it, in the order of the files.

        Args:
            files: what to read.
            max_tokens: limit of a chunk, title and text, in the embedder's tokens.
            report: is told of "chunk", files done, files in all.
        """

    def embed(self, passages: Sequence[str], report: Progress) -> np.ndarray:
        """Return the vectors of passages as the embedder returns them, float32 [passages, dimension].

        Args:
            passages: what to embed.
            report: is told of "embed", passages done, passages in all.

        Raises:
            DataError: a passage is longer than the embedder reads.
        """


class Here:
    """This process does it all, one file after another."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def cut(self, files: Sequence[File], max_tokens: int, report: Progress) -> list[Cut | Skipped]:
        """Read and cut files; see `Workers`."""
        done = []
        for file in files:
            done.append(cut(file, max_tokens, self._embedder.token_count))
            report("chunk", len(done), len(files))
        return done

    def embed(self, passages: Sequence[str], report: Progress) -> np.ndarray:
        """Embed passages; see `Workers`."""
        return self._embedder.embed(passages, lambda done, total: report("embed", done, total))


def cut(file: File, max_tokens: int, token_count: Callable[[str], int]) -> Cut | Skipped:
    """Read a file and cut it into chunks of at most `max_tokens`, as `token_count` counts; `Skipped` if it is left out."""
    found = read(file)
    if isinstance(found, Skipped):
        return found
    return Cut(found.source, found.sha256, tuple(chunk(found, max_tokens, token_count)) if found.sections else None)
