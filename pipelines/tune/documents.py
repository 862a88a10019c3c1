"""A folder of documents -> rows of plain text: continued pre-training on whatever pipelines.rag.load reads.

Each document is taken in reading order, its headings where they stand, and cut at paragraphs into pieces that do not
overlap. Every token of a piece is learnt, and an end-of-text token after a document's last piece only. No questions are
made from the text, and no chat template is put around it. Run as a part of:

    make finetune DATA=path/to/folder EPOCHS=3
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.rag.chunk import chunk
from pipelines.rag.load import Document, Section, Skipped, document_files, load
from pipelines.tune.packing import text_tokens
from pipelines.tune.rows import Row

PIECE_TOKENS = 512  # at most; beyond it attention costs more than the longer context tells
SPARE_TOKENS = 4  # a piece that is counted behind others can have a token or two more than alone
SHOWN_SKIPPED = 3
NEXT = "llmlab finetune --data path/to/folder --epochs 3"


@dataclass(frozen=True)
class Read:
    """What a folder holds: rows in reading order, and the files that were left out with the reason."""

    rows: list[Row]
    documents: int
    skipped: list[Skipped]

    def note(self, name: str) -> str:
        """Return what is learnt of a folder, in one line, and what is not."""
        shown = "; ".join(f"{s.path}: {s.reason}" for s in self.skipped[:SHOWN_SKIPPED])
        more = f"; and {len(self.skipped) - SHOWN_SKIPPED} more" if len(self.skipped) > SHOWN_SKIPPED else ""
        left_out = f"\n{len(self.skipped)} files left out: {shown}{more}" if self.skipped else ""
        return (f"{name}: {self.documents} documents in {len(self.rows)} pieces of plain text; every token is learnt (continued "
                f"pre-training), not how to answer questions about them{left_out}")  # fmt: skip


def read_documents(folder: Path, tokenizer: Any, max_tokens: int) -> Read:
    """Read a folder as rows of plain text.

    Args:
        folder: hidden files are passed over, and links that lead out of it.
        tokenizer: of the model that learns them.
        max_tokens: longest sequence of the recipe; pieces have `PIECE_TOKENS` at most.

    Raises:
        DataError: nothing in the folder can be read.
    """
    try:
        documents, skipped = load(folder)
    except DataError as problem:
        raise DataError(problem.came, f"{problem.expected}; or a file of rows", NEXT) from None
    limit = min(PIECE_TOKENS, max_tokens) - SPARE_TOKENS
    rows = [row for document in documents for row in _rows(document, tokenizer, limit)]
    return Read(rows, len(documents), skipped)


def folder_sha256(folder: Path) -> str:
    """Return the fingerprint of every document below a folder: names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for path in document_files(folder):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def document_text(document: Document) -> str:
    """Return a document as it reads: each heading once, with its text below it."""
    parts: list[str] = []
    before: Sequence[str] = (Path(document.source).stem,)  # a file without headings is called after itself
    for section in document.sections:
        parts += [*_headings(section, before), section.text]
        before = section.path
    return "\n\n".join(parts)


def _headings(section: Section, before: Sequence[str]) -> list[str]:
    """Return the headings that a section adds to those before it; one that is the text itself is not said twice."""
    shared = next((i for i, (a, b) in enumerate(zip(section.path, before, strict=False)) if a != b),
                  min(len(section.path), len(before)))  # fmt: skip
    added = list(section.path[shared:])
    return added[:-1] if added and added[-1] == section.text else added


def _rows(document: Document, tokenizer: Any, limit: int) -> list[Row]:
    whole = Document(document.source, document.title, (Section((), document_text(document)),))
    texts = [piece.text for piece in chunk(whole, limit, lambda text: len(text_tokens(text, tokenizer)) + 1)]
    return [
        Row((), None, f"{document.source}#{number}", document.source, text, ends=number == len(texts))
        for number, text in enumerate(texts, 1)
    ]
