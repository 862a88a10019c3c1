"""Packing changes nothing but the time: the same losses and gradients as rows one by one."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError, TrainingFailed
from pipelines.tune import data
from pipelines.tune.packing import Encoded, Packed, collate, encode, encode_pair, families, fit, tree
from pipelines.tune.rows import Row
from pipelines.tune.sft import Supervised, label_loss
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe


def conversation(*contents: str) -> Row:
    roles = ("user", "assistant") * len(contents)
    return Row(tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False)))


def test_loss_and_gradients_are_those_of_the_rows_one_by_one(
    tiny: Path, tokenizer: Any, groups: list[list[data.Example]]
) -> None:
    model = tiny_model(tiny, tiny_recipe())
    rows = [encode(e.row, tokenizer) for group in groups[:4] for e in group]
    rows.append(encode(conversation("Hello", "Good day.", "And now?", "Goodbye."), tokenizer))
    trees = [tree([rows[i] for i in family]) for family in families(rows, 5)]
    together = gradients(model, lambda: sum(label_loss(model, collate([p], 2)) for p in fit(trees, 1500)))
    padded = gradients(model, lambda: label_loss(model, collate(trees, 2)))
    alone = gradients(model, lambda: sum(transformers_loss(model, row) for row in rows))
    assert len(fit(trees, 1500)) < len(trees)
    for packed in (together, padded):
        assert packed[0] == pytest.approx(alone[0], rel=1e-5)
        for name, gradient in alone[1].items():
            assert (packed[1][name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert sum(len(t.tokens) for t in trees) < 0.6 * sum(len(row.tokens) for row in rows)


def transformers_loss(model: Any, row: Encoded) -> Any:
    """The library's own loss of one row, unpacked."""
    import torch

    labels = [-100, *(-100 if label is None else label for label in row.labels)]
    return model(input_ids=torch.tensor([[*row.tokens, 0]]), labels=torch.tensor([labels])).loss * row.supervised


def gradients(model: Any, loss: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    value = loss()
    value.backward()
    return float(value.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_no_token_sees_another_row_and_positions_restart(tiny: Path, trees: list[Packed]) -> None:
    import torch

    model = tiny_model(tiny, tiny_recipe()).eval()
    sequence = fit(trees[:3], 4096)[0]
    batch = collate([sequence], 2)
    mask, tree_of, branch_of = batch["attention_mask"][0, 0], sequence.tree, sequence.branch
    for place in random.Random(0).sample(range(len(sequence.tokens)), 200):
        seen = {int(i) for i in mask[place].nonzero()}
        allowed = {
            i for i in range(place + 1) if tree_of[i] == tree_of[place] and branch_of[i] in (0, branch_of[place])
        }  # fmt: skip
        assert seen == allowed
        assert sequence.positions[place] == len(seen) - 1
    changed = copy.deepcopy(sequence)
    other = max(changed.tree)
    for i, t in enumerate(changed.tree):
        if t == other:
            changed.tokens[i] = 5
    with torch.no_grad():
        before, after = (model(**model_inputs(collate([s], 2))).logits[0] for s in (sequence, changed))
    kept = torch.tensor([t != other for t in sequence.tree])
    assert torch.equal(before[kept], after[kept])


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}


def test_more_sequences_at_once_give_the_same_gradient(tiny: Path, trees: list[Packed]) -> None:
    model, objective = tiny_model(tiny, tiny_recipe()), Supervised(2)
    one = gradients(model, lambda: sum(objective.total(model, [t]) for t in trees[:4]))
    four = gradients(model, lambda: objective.total(model, trees[:4]))
    assert one[0] == pytest.approx(four[0], rel=1e-5)
    assert max(float((one[1][n] - four[1][n]).abs().max()) for n in one[1]) < 1e-4


def test_every_reply_is_supervised_to_its_end(tokenizer: Any, trees: list[Packed]) -> None:
    for packed in trees:
        assert sum(label == tokenizer.eos_token_id for label in packed.labels) == packed.rows


def test_every_turn_of_a_conversation_is_supervised(tokenizer: Any) -> None:
    row = encode(conversation("One", "First.", "Two", "Second."), tokenizer)
    text = tokenizer.decode([label for label in row.labels if label is not None])
    assert text == f"First.{tokenizer.eos_token}Second.{tokenizer.eos_token}"
    assert all(row.tokens[i + 1] == label for i, label in enumerate(row.labels[:-1]) if label is not None)


def test_of_a_preference_only_the_last_reply_is_supervised(tokenizer: Any) -> None:
    row = conversation("One", "First.", "Two", "Second.")
    chosen, rejected = encode_pair(Row(row.messages, "Third."), tokenizer)
    for encoded, reply in ((chosen, "Second."), (rejected, "Third.")):
        assert tokenizer.decode([label for label in encoded.labels if label is not None]) == reply + tokenizer.eos_token
    with pytest.raises(DataError, match="no rejected reply"):
        encode_pair(row, tokenizer)


def test_a_template_without_end_of_turn_is_refused(tokenizer: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    with pytest.raises(TrainingFailed, match="end-of-turn"):
        encode(conversation("Hello", "Good day."), broken)


def test_a_template_that_renders_the_prompt_anew_is_refused(tokenizer: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(TrainingFailed, match="differently once it is answered"):
        encode(conversation("Hello", "Good day."), broken)


def test_a_tree_that_is_too_long_is_an_error_and_is_not_cut(trees: list[Packed]) -> None:
    with pytest.raises(DataError, match="max_tokens=128"):
        fit(trees, 128)


def test_best_fit_fills_sequences(trees: list[Packed]) -> None:
    bins = fit(trees, 2000)
    assert sum(b.rows for b in bins) == sum(t.rows for t in trees)
    assert max(len(b.tokens) for b in bins) <= 2000
    assert len(bins) <= -(-sum(len(t.tokens) for t in trees) // 2000) + 1


def test_rows_with_one_prompt_become_a_family() -> None:
    long = list(range(100, 160))
    rows = [Encoded([*long, n, 7], [None] * 60 + [7, 9]) for n in range(5)]
    rows += [Encoded([1, 2, 3], [None, 3, 9]), Encoded([1, 50, 51, 52, 53, 54], [None] * 5 + [9])]
    assert sorted(map(len, families(rows, 4))) == [1, 1, 1, 4]
