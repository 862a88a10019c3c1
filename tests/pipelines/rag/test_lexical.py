"""Search by words: the scores are BM25's, the stems are Snowball's, and nothing is lost in the file."""

from __future__ import annotations

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from pipelines.errors import UnknownName
from pipelines.rag.lexical import Lexical, read

PASSAGES = [
    "Claude 2: The licence is commercial.",
    "Claude 2.1: It accepts 200K tokens of context.",
    "Falcon 40B: Its licences are permissive; the licence is Apache 2.0.",
    "…",
    "Köln: Die Straße ist naß.",
]


def test_scores_are_those_of_another_implementation() -> None:
    """rank_bm25 takes another inverse document frequency, so one word at a time is compared, in proportion."""
    words = [p.lower().split() for p in PASSAGES * 3 + ["the only passage with a rare word"] * 2]
    theirs, ours = BM25Okapi(words, k1=1.5, b=0.75), Lexical.of([" ".join(w) for w in words], "none")
    for word in ("claude", "context", "rare", "permissive"):
        expected, found = theirs.get_scores([w for w in (word,) if w]), ours.scores(word)
        matching = np.array([word in " ".join(w) for w in words])
        assert (found[~matching] == 0).all() and (found[matching] > 0).all()
        if expected.max() > 0 and all(word in w for w in np.array(words, dtype=object)[matching]):
            np.testing.assert_allclose(found / found.max(), expected / expected.max(), rtol=0.1)


def test_stems_single_characters_and_other_letters_are_words() -> None:
    words = Lexical.of(PASSAGES, "english")
    assert words.scores("licences")[[0, 2]].min() > 0 and words.scores("licences")[1] == 0
    assert words.scores("Claude 2").argmax() == 0
    assert words.scores("STRASSE").max() == 0 < words.scores("straße").max()
    assert Lexical.of(PASSAGES, "none").scores("licences")[0] == 0


@pytest.mark.parametrize("question", ["", "…", "unknown words only", "2", "claude " * 500])
def test_any_question_gets_a_score_for_every_passage(question: str) -> None:
    scores = Lexical.of(PASSAGES, "english").scores(question)
    assert scores.shape == (5,) and scores.dtype == np.float32 and np.isfinite(scores).all()


def test_the_file_gives_the_same_scores() -> None:
    words = Lexical.of(PASSAGES, "english")
    again = read(words.serialised())
    for question in ("licence of Falcon", "200K", "naß"):
        np.testing.assert_array_equal(again.scores(question), words.scores(question))


def test_passages_without_any_word() -> None:
    assert Lexical.of(["…", "!"], "english").scores("anything").tolist() == [0, 0]


def test_an_unknown_stemmer_is_told() -> None:
    with pytest.raises(UnknownName, match="german"):
        Lexical.of(PASSAGES, "germna")
