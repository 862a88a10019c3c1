"""Small models of true architectures: sizes, blocks of text, training, and losses by place."""

from __future__ import annotations

import torch

from labs.frame import small

TEXT = ["the cat sat on the mat and the dog sat on the log. " * 20, "a second text about a cat and a log. " * 20]


def test_a_small_model_is_the_true_architecture_and_learns() -> None:
    made = small.make("mistral-7b", TEXT, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    again = small.make(
        "mistral-7b", [], made.tokenizer, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
    )
    assert type(made.model).__name__ == "MistralForCausalLM" and made.model.config.hidden_size == 32
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
    rows = small.blocks(TEXT, made.tokenizer, 16)
    assert rows.shape[1] == 17 and torch.equal(rows[0, -1], rows[1, 0])
    before = small.losses(made.model, rows)
    with torch.inference_mode():
        oracle = made.model(input_ids=rows[:1, :-1], labels=rows[:1, :-1]).loss
    assert before.shape == (len(rows), 16)
    torch.testing.assert_close(before[0, :-1].mean(), oracle)
    steps = small.teach(made.model, rows, 12, batch=4, rate=1e-2)
    assert len(steps) == 12 and small.losses(made.model, rows).mean() < before.mean() - 1
    assert small.teach(again.model, rows, 12, batch=4, rate=1e-2) == steps


def test_sizes_of_a_model_with_eyes_are_those_of_its_text() -> None:
    made = small.make("llama-4", TEXT, hidden_size=64, num_hidden_layers=2, num_local_experts=2)
    text = made.model.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.num_local_experts) == (64, 2, 2)
    assert text.model_type == "llama4_text"
