"""What a model is shown of a passage: the chunk that was found, or more of the page around it.

Small chunks are found precisely and say little; their neighbours below the same heading say the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.rag.index import Hit, Index


def widened(hits: Sequence[Hit], index: Index, neighbours: int, may: Callable[[Sequence[int]], bool]) -> list[Hit]:
    """Return the hits with the text of their neighbours around their own.

    Args:
        hits: best first; their rows are of the index.
        index: that they are from.
        neighbours: chunks before and behind, of the same document and heading; a chunk comes once, with the best hit that it
            is near, and a hit that a better one already shows does not come again.
        may: whether the texts of some rows may be shown as one; a neighbour with which they may not ends the text on its side.
    """
    shown: set[int] = set()
    found = []
    for hit in hits:
        if hit.row in shown:
            continue
        around = _around(hit.row, index, neighbours, shown, may)
        shown.update(around)
        found.append(replace(hit, text=joined_text(index, around)))
    return found


def joined_text(index: Index, rows: Sequence[int]) -> str:
    """Return the texts of some chunks as one."""
    return " ".join(index.chunks[row].text for row in rows)


def _around(row: int, index: Index, neighbours: int, shown: Set[int], may: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """Return the rows of a chunk and its neighbours, in the order of the document."""

    def belongs(other: int) -> bool:
        return 0 <= other < len(index.chunks) and other not in shown and _place(index, other) == _place(index, row)

    first = last = row
    for _ in range(neighbours):
        if belongs(first - 1) and may(range(first - 1, last + 1)):
            first -= 1
        if belongs(last + 1) and may(range(first, last + 2)):
            last += 1
    return range(first, last + 1)


def _place(index: Index, row: int) -> tuple[str, str, int | None]:
    chunk = index.chunks[row]
    return chunk.source, chunk.title, chunk.page
