"""Questions about the documents of an index, as people write them down: JSON lines with a question, its document, its answer.

From them a threshold of abstention is learned (pipelines.rag.abstention), and a reader (pipelines.tune.from_questions).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import DataError

if TYPE_CHECKING:
    from pipelines.rag.index import Index

EXPECTED = """a line such as {"question": "Who made Phi-2?", "source": "phi-2.md", "answer": "Microsoft"}"""


@dataclass(frozen=True)
class Asked:
    """A question to learn from.

    Attributes:
        text: the question.
        source: the document that answers it; None if no document does.
        answer: in the words of the document; None if it was not written down.
    """

    text: str
    source: str | None
    answer: str | None = None


def read_questions(path: Path) -> list[Asked]:
    """Read JSON lines `{"question": ..., "source": ..., "answer": ...}`.

    No source, or null, says that no document holds the answer; the answer may be left out.

    Raises:
        DataError: the file cannot be read, or a line is something else; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__})", "a file of JSON lines") from None
    return [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def check_sources(asked: Sequence[Asked], index: Index) -> None:
    """Raise `DataError` for a source that is not in the index; names what is like it."""
    sources = sorted({chunk.source for chunk in index.chunks})
    for missing in (one.source for one in asked if one.source is not None and one.source not in sources):
        near = difflib.get_close_matches(missing, sources, n=3, cutoff=0.0)
        raise DataError(f"no chunk is of the document {missing!r}", f"a source of the index, such as {', '.join(near)}")


def _question(path: Path, number: int, line: str) -> Asked:
    try:
        row = json.loads(line)
        found = Asked(row["question"], row.get("source"), row.get("answer"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"line {number} of {path} is {line[:80]!r}", EXPECTED) from None
    well_formed = isinstance(found.text, str) and found.text.strip()
    if not well_formed or not isinstance(found.source, str | None) or not isinstance(found.answer, str | None):
        raise DataError(f"line {number} of {path} is {line[:80]!r}", EXPECTED)
    return found
