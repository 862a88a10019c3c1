from __future__ import annotations

import pytest

from pipelines.evaluate.scores import class_f1, normalise, score, token_f1
from pipelines.rag.answer import ABSTENTION, messages, parse, reply_text
from pipelines.tune.data import Example, Page

PAGES = (Page("vela", "Vela > Origin", "Vela was made by Orion."), Page("kite", "Kite", "Kite flies."))


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ("the Apache 2.0 licence", "Apache 2.0", 0.8),  # two of three tokens, both of two
        ("Orion", "orion.", 1.0),
        ("", "Orion", 0.0),
        ("a b b", "b b b", 0.8),  # the article is dropped, repeated tokens count as often as in both
    ],
)
def test_token_f1_by_hand(predicted: str, truth: str, expected: float) -> None:
    assert token_f1(predicted, truth) == pytest.approx(expected)


def test_normalise_as_squad_does() -> None:
    assert normalise("  The Quick, brown (Fox)!  ") == "quick brown fox"


def test_class_f1_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    truth, predicted = [True, True, False, False, True, False], [True, False, True, False, True, False]
    assert class_f1(truth, predicted) == pytest.approx(f1_score(truth, predicted))
    assert class_f1([True], [False]) == 0.0


def test_a_reply_is_taken_apart() -> None:
    reply = parse("Orion [1] [7] [1]", 2)
    assert (reply.text, reply.cited, reply.invalid, reply.abstained) == ("Orion", (1,), (7,), False)
    assert parse(ABSTENTION, 2).abstained
    assert reply_text("Orion", 1) == "Orion [1]"
    assert reply_text("Orion", None) == ABSTENTION


def test_a_prompt_numbers_its_passages_and_ends_with_the_question() -> None:
    system, user = messages("Who made\nVela?", PAGES)
    assert system["role"] == "system"
    assert user["content"] == "[1] Vela > Origin: Vela was made by Orion.\n[2] Kite: Kite flies.\n\nQuestion: Who made Vela?"


def test_scores_count_what_they_say() -> None:
    right = Example("Who made Vela?", "vela", "developer", PAGES, "Orion", "Orion", (1,))
    missed = Example("Who made Vela?", "vela", "developer", PAGES[1:], "Orion", None, ())
    absent = Example("Who made Wren?", "", "developer", PAGES, None, None, ())
    examples = [right, right, missed, absent]
    replies = [parse("Orion [1]", 2), parse("Orion [2]", 2), parse(ABSTENTION, 1), parse("Orion [1]", 2)]
    scores = score(examples, replies)
    assert scores.f1 == pytest.approx(2 / 3)  # a missed retrieval counts 0; the unanswerable question does not count
    assert scores.citation_accuracy == pytest.approx(1 / 2)
    assert scores.abstention_f1 == pytest.approx(2 / 3)  # one of two, never wrong
