"""Chunking: the limit holds with the title, no word is lost, and ids stay."""

from __future__ import annotations

import random
import time

import pytest

from pipelines.rag.chunk import MAX_CHARACTERS_PER_TOKEN, Chunk, chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.load import Document, Section


def document(*sections: tuple[tuple[str, ...], str]) -> Document:
    return Document("a.md", "A", tuple(Section(path, text) for path, text in sections))


def prose(seed: int) -> str:
    """Return paragraphs, lists, tables, code, long sentences, long words, and other scripts."""
    rng = random.Random(seed)
    words = ["retrieval", "café", "naïve", "模型", "GPU-4090", "a/b", "x" * 300, "https://example.org/a?b=c", "…", "🙂", "don't"]
    blocks = []
    for _ in range(12):
        sentence = " ".join(rng.choices(words, k=rng.choice([3, 20, 120])))
        blocks.append(
            rng.choice([f"{sentence}. {sentence}!", f"- {sentence}\n- {sentence}", f"| {sentence} | b |\n|x|y|", sentence])
        )
    return "\n\n".join(blocks)


@pytest.mark.parametrize("max_tokens", [32, 96, 256])
@pytest.mark.parametrize("seed", range(3))
def test_no_chunk_is_too_long_and_no_character_is_lost(minilm: Embedder, seed: int, max_tokens: int) -> None:
    text = prose(seed)
    chunks = chunk(document((("A", "Part"), text)), max_tokens, minilm.token_count)
    assert max(minilm.token_count(c.passage) for c in chunks) <= max_tokens
    assert max(len(c.passage) for c in chunks) <= max_tokens * MAX_CHARACTERS_PER_TOKEN
    assert "".join("".join(c.text for c in chunks).split()) == "".join(text.split())
    assert all(text[c.start : c.end] == c.text for c in chunks)


def test_cuts_fall_where_the_structure_is(minilm: Embedder) -> None:
    text = "One two three four five six. Seven eight nine ten eleven twelve.\n\nA new paragraph of some ten words or so here."
    chunks = chunk(document((("A",), text)), 20, minilm.token_count)
    assert [c.text for c in chunks] == [
        "One two three four five six. Seven eight nine ten eleven twelve.",
        "A new paragraph of some ten words or so here.",
    ]


def test_a_title_that_leaves_no_room_goes_into_the_text(minilm: Embedder) -> None:
    heading = " ".join(f"word{number}" for number in range(60))
    chunks = chunk(document((("A", heading), "The body.")), 48, minilm.token_count)
    assert max(minilm.token_count(c.passage) for c in chunks) <= 48
    assert "".join("".join(c.text for c in chunks).split()) == "".join(f"A>{heading}Thebody.".split())
    assert chunks[0].title.startswith("A > word0 word1") and chunks[0].title.endswith("…")


def ids(chunks: list[Chunk]) -> dict[str, str]:
    return {c.text: c.id for c in chunks}


def test_unchanged_text_keeps_its_id_and_every_id_is_unique(minilm: Embedder) -> None:
    same = (("A", "Example"), "Run it.")
    before = chunk(document(same, (("A", "B"), "Text of B."), same), 96, minilm.token_count)
    after = chunk(
        document((("A", "New"), "Text before."), same, (("A", "B"), "Text of B, changed."), same), 96, minilm.token_count
    )
    assert len({c.id for c in before}) == len(before) == 3
    assert [c.id for c in before if c.text == "Run it."] == [c.id for c in after if c.text == "Run it."]
    assert before[1].id not in {c.id for c in after}


def test_a_large_line_is_cut_in_reasonable_time(minilm: Embedder) -> None:
    text = "0123456789abcdef" * 4_000 + "." + "a,b" * 8_000 + " " + "word " * 4_000
    started = time.perf_counter()
    chunks = chunk(document((("A",), text)), 96, minilm.token_count)
    assert "".join("".join(c.text for c in chunks).split()) == "".join(text.split())
    assert time.perf_counter() - started < 30
