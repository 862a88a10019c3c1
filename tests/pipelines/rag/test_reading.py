"""An answer read piece by piece gives what reading it whole gives, wherever tokens split it."""

from __future__ import annotations

import random

import pytest

from pipelines.rag.answer import ABSTENTION, parse
from pipelines.rag.reading import Reading
from pipelines.rag.support import sentences

ANSWERS = [
    "Vela was made by Orion Labs [1]. It has 9 billion parameters. [2] [12] Yes!",
    "Two at once [1][2]. \"Quoted\" [3]? (Aside.) Version 3.5 of v. 2 [0].",
    "No full stop and a mark [1]",
    "A mark that never ends [1",
    "Not a mark [a] [ 1] [-1] [1 ] [[1]]. Next\n\nline.\nAnother [00001].",
    "東京 is large [1]. Ünder [٣]. end",
    "",
    "   ",
    ".",
    "[1]",
    "Same [1]. Same [1]. Same [1].",
]  # fmt: skip


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("text", ANSWERS)
def test_however_it_is_split_the_same_is_read(text: str) -> None:
    reply = parse(text, 3)
    for seed in range(200):
        reading, numbers, found = Reading(3), list[int](), list[str]()
        for piece in pieces_of(text, random.Random(seed)):
            cited, complete = reading.feed(piece)
            numbers += cited
            found += complete
        found += reading.end()
        assert reading.text == text and found == sentences(text), seed
        assert sorted(numbers) == sorted((*reply.cited, *reply.invalid)), seed
        assert [n for n in numbers if 1 <= n <= 3] == list(reply.cited), seed


def test_a_number_is_told_when_its_mark_ends_and_once() -> None:
    reading = Reading(2)
    assert [reading.feed(piece)[0] for piece in ("It is [", "1", "2", "]", " and [12] [2", "]")] == [[], [], [], [12], [], [2]]


def test_a_sentence_is_told_when_the_next_begins() -> None:
    reading = Reading(2)
    assert [reading.feed(piece)[1] for piece in ("One.", " ", "[1", "]", " T", "wo.")] == [[], [], [], [], ["One. [1]"], []]
    assert reading.end() == ["Two."] and reading.end() == []


def test_an_abstention_has_no_sentences() -> None:
    reading = Reading(2)
    assert reading.feed(ABSTENTION) == ([], []) and reading.feed(" More.") == ([], []) and reading.end() == []
