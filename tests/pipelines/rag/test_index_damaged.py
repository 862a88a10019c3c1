"""Damage to the files of an index: a lost end, more than was written, one bit that is another. Each is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import LabError, RunIncomplete
from pipelines.rag.index import RagConfig, open_index, sync

FLIPPED_BITS, LOST_ENDS = 24, 6
FILES = ("CURRENT", "chunks.sqlite", "manifest.json", "vectors.faiss", "vectors.npy", "words.safetensors")


def damages(content: bytes, seed: str) -> Iterator[bytes]:
    """Yield the content with damage of each kind, at places that a seed decides."""
    drawn = random.Random(seed)
    for length in (0, 1, len(content) - 2, *(drawn.randrange(len(content) - 1) for _ in range(LOST_ENDS))):
        yield content[:length]
    yield content + content[:1]
    for _ in range(FLIPPED_BITS):
        place, bit = drawn.randrange(len(content) - 1), drawn.randrange(8)  # the last byte of a text file is its line end
        yield content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


@pytest.fixture
def generation(docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path) -> Path:
    """Return a generation that has every kind of file: an approximate index needs a thousand chunks."""
    (docs / "many.md").write_text("".join(f"# Part {n}\n\nThis is part {n}.\n\n" for n in range(1000)))
    report = sync(docs, "lab", config.model_copy(update={"vectors": "ivf-sq8"}), hash_embedder)
    return index_folder / "lab" / report.generation


def test_the_files_that_are_damaged_are_all_there_are(generation: Path) -> None:
    assert sorted(["CURRENT", *(p.name for p in generation.iterdir())]) == list(FILES)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_and_never_a_traceback(generation: Path, hash_embedder: Any, name: str) -> None:
    path = (generation.parent if name == "CURRENT" else generation) / name
    whole = path.read_bytes()
    for content in damages(whole, name):
        path.write_bytes(content)
        with pytest.raises(RunIncomplete) as raised:
            open_index("lab", hash_embedder)
        assert "make index" in raised.value.next_command
    path.write_bytes(whole)
    assert len(open_index("lab", hash_embedder)) == 1007


@pytest.mark.parametrize("content", ["[]", "null", "1", '{"format": 4}', '{"format": 4, "sha256": 0}', "{}", '"'])
def test_a_manifest_of_another_shape_is_refused(generation: Path, hash_embedder: Any, content: str) -> None:
    (generation / "manifest.json").write_text(content)
    with pytest.raises(LabError):
        open_index("lab", hash_embedder)
