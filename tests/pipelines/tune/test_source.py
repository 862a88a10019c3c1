"""From a recipe's data to steps: files, epochs, what is held out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError, DataError, TrainingFailed
from pipelines.tune import source
from pipelines.tune.recipe import Recipe, load_recipe


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(file: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "lora", [f"data={file}", "schedule.steps=null", "schedule.epochs=2", "schedule.max_tokens=4096", *overrides]
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(100)])


def texts(steps: list[Any], tokenizer: Any) -> list[str]:
    return [tokenizer.decode([t for t in p.labels if t is not None]) for step in steps for p in step]


def test_an_epoch_holds_every_row_once_in_steps_of_the_batch(file: Path, tokenizer: Any) -> None:
    prepared = source.prepare(recipe(file, "schedule.rows_per_prompt=1"), tokenizer)
    assert len(prepared.held_out) == 5
    assert prepared.rows == 2 * 95
    assert {sum(p.rows for p in step) for step in prepared.steps} <= {8, 95 % 8}
    half = len(prepared.steps) // 2
    first, second = (sorted("".join(texts(part, tokenizer)).split(tokenizer.eos_token)) for part in
                     (prepared.steps[:half], prepared.steps[half:]))  # fmt: skip
    assert first == second and len(first) == 96


def test_the_order_follows_from_the_seed(file: Path, tokenizer: Any) -> None:
    prints = [source.prepare(recipe(file, f"schedule.seed={seed}"), tokenizer).sha256 for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


def test_a_repeated_prompt_never_stands_on_both_sides(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "twice.jsonl", [(f"Name a word with {n % 50} letters.", f"Answer {n}") for n in range(100)])
    prepared = source.prepare(recipe(file), tokenizer)
    held_out = {row.prompt[0]["content"] for row in prepared.held_out}
    learnt = "".join(tokenizer.decode(p.tokens) for step in prepared.steps for p in step)
    assert held_out and not any(prompt in learnt for prompt in held_out)


def test_a_small_file_is_learnt_whole(tmp_path: Path, tokenizer: Any) -> None:
    prepared = source.prepare(recipe(write(tmp_path / "few.jsonl", [("One?", "1"), ("Two?", "2")])), tokenizer)
    assert prepared.held_out == [] and prepared.rows == 4


def test_part_of_an_epoch(file: Path, tokenizer: Any) -> None:
    prepared = source.prepare(recipe(file, "schedule.epochs=0.5", "schedule.rows_per_prompt=1"), tokenizer)
    assert len(prepared.steps) == 6


def test_a_row_that_is_too_long_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "long.jsonl", [("word " * 2000, "yes")])
    with pytest.raises(DataError, match="max_tokens=512"):
        source.prepare(recipe(file, "schedule.max_tokens=512"), tokenizer)


def test_a_generated_set_has_no_epochs(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no epochs"):
        source.prepare(load_recipe("lora", ["schedule.steps=null", "schedule.epochs=1"]), tokenizer)


def test_a_generated_set_makes_as_many_groups_as_its_steps_take(tokenizer: Any) -> None:
    overrides = ["schedule.steps=4", "schedule.rows_per_step=24", "schedule.rows_per_prompt=8", "schedule.max_tokens=4096"]
    prepared = source.prepare(load_recipe("lora-quick", overrides), tokenizer)
    assert len(prepared.steps) == 4 and prepared.rows == 4 * 24
    assert prepared.held_out


def test_equal_replies_are_no_preference(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Hello", "chosen": "Good day.", "rejected": "Good day."}) + "\n", encoding="utf-8")
    dpo = load_recipe("dpo", [f"data={file}", "schedule.steps=null", "schedule.epochs=1"])
    with pytest.raises((DataError, TrainingFailed)):
        source.prepare(dpo, tokenizer)


def test_a_configuration_names_the_file_by_its_content(file: Path) -> None:
    resolved = source.resolved(recipe(file))
    assert resolved["file"]["name"] == "rows.jsonl" and len(resolved["file"]["sha256"]) == 64
    with pytest.raises(ConfigError, match="readers"):
        source.resolved(load_recipe("lora", ["data=readers"]))


def test_questions_about_one_text_stay_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    texts_about = [f"Text {n}. " + f"The town number {n} lies on a river. " * 8 for n in range(60)]
    file = write(tmp_path / "texts.jsonl", [(f"{text}\nQuestion {q}?", "a river") for text in texts_about for q in range(3)])
    held_out = source.prepare(recipe(file), tokenizer).held_out
    begun = [row.prompt[0]["content"][:10] for row in held_out]
    assert len(held_out) == 9 and all(begun.count(b) == 3 for b in begun)


def test_rows_of_one_group_stay_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    """However they begin: questions about a chunk whose passages stand in another order each time."""
    file = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"{n} is how this begins, for {n // 4}.", "completion": f"{n}", "group": f"chunk {n // 4}"} for n in range(100)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    groups = [row.group for row in source.prepare(recipe(file), tokenizer).held_out]
    assert groups and all(groups.count(group) == 4 for group in groups)


def test_evaluation_rows_that_are_learnt_are_refused_unless_told(file: Path, tmp_path: Path, tokenizer: Any) -> None:
    other = write(tmp_path / "other.jsonl", [("What is 3 plus 3?", "Six."), ("What is the capital of Peru?", "Lima.")])
    with pytest.raises(DataError, match="1 of 2 evaluation rows overlap(.|\n)*other.jsonl:1"):
        source.prepare(recipe(file, f"evaluation={other}"), tokenizer)
    prepared = source.prepare(recipe(file, f"evaluation={other}", "allow_overlap=true"), tokenizer)
    assert len(prepared.held_out) == 2 and prepared.rows == 200
