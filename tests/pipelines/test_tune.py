"""The tuning job on real parts: a few steps of SmolLM2-135M, and Mistral rehearsed in NF4."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelines import catalogue, runs, weights
from pipelines.errors import ConfigError, DataError, RehearsalRefused, Rehearsed, TrainingFailed, WeightsMissing
from pipelines.runs import Run
from pipelines.tune import adapter, data, packing, rehearsal, sft, template
from pipelines.tune.finetune import Job, finetune, load_base, training_set
from pipelines.tune.groups import training_groups
from pipelines.tune.recipe import load_recipe
from tests.conftest import MODEL, Quiet


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shrunk Llama with its tokenizer, as the rehearsal makes it."""
    texts = [p.read_text() for p in sorted(data.KNOWLEDGE.glob("*.md"))]
    return rehearsal.build(catalogue.runnable(MODEL), texts, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def groups() -> list[list[data.Example]]:
    config = data.load_reader()
    corpus, _ = data.corpora(config)
    return list(training_groups(config, corpus, 12, 5, seed=3))


def test_a_run_holds_everything_it_promises(tuned_run: Run) -> None:
    names = {str(p.relative_to(tuned_run.path)) for p in tuned_run.path.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "loss.png", "template_lock.json", "manifest.json", "adapter.gguf",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tuned_run.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 15))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert tuned_run.facts["logit_change"] > 1
    assert (tuned_run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = tuned_run.json("adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert str(Path.cwd()) not in json.dumps(config)


def test_mistral_is_rehearsed_in_nf4_and_marked(rehearsed_run: Run) -> None:
    assert rehearsed_run.rehearsal
    assert rehearsed_run.json("config.json")["recipe"]["method"] == "qlora"
    assert (rehearsed_run.path / "adapter.gguf").stat().st_size > 10_000


def test_without_weights_the_job_says_rehearsed_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quiet = Quiet()
    with pytest.raises(Rehearsed, match="mistral-7b was rehearsed, not tuned") as caught:
        finetune(Job("mistral-7b", overrides=("schedule.max_tokens=512",), pull=False), quiet)
    assert caught.value.exit_status == 4
    assert "llmlab pull mistral-7b" in str(caught.value)
    assert quiet.plans[0].quantised_parameters > 6e9
    assert any("weights of mistral-7b are not on this machine" in line for line in quiet.lines)


def test_a_plan_that_does_not_fit_is_rehearsed_before_anything_is_fetched() -> None:
    quiet = Quiet()
    with pytest.raises(Rehearsed, match="does not fit: memory"):
        finetune(Job("mistral-7b", overrides=("schedule.max_tokens=500000",)), quiet)
    assert not any("fetching" in line for line in quiet.lines)


def test_a_rehearsal_is_not_evaluated(rehearsed_run: Run) -> None:
    from pipelines.evaluate.reader import evaluate

    with pytest.raises(RehearsalRefused):
        evaluate(rehearsed_run, 4, lambda *_: None)


def test_weights_are_not_fetched_when_that_is_forbidden() -> None:
    with pytest.raises(WeightsMissing, match="14.5 GB"):
        weights.obtain(catalogue.runnable("mistral-7b"), pull=False, say=print)


def test_a_model_with_facts_only_cannot_be_tuned() -> None:
    with pytest.raises(ConfigError, match="has facts in the catalogue"):
        finetune(Job("gpt-4o"), Quiet())


def test_the_loss_of_a_group_is_that_of_its_examples_one_by_one(
    tiny: Path, tokenizer: Any, groups: list[list[data.Example]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    packed = [packing.pack(group, tokenizer, 4096) for group in groups[:3]]
    with torch.no_grad():
        together = sft.label_loss(model, packing.collate(packed, tokenizer.pad_token_id))
        alone = torch.tensor(0.0)
        for example in (e for group in groups[:3] for e in group):
            prompt, target = packing.encode(example, tokenizer)
            ids = torch.tensor([prompt + target])
            labels = torch.tensor([[-100] * len(prompt) + target])
            alone += model(input_ids=ids, labels=labels).loss * len(target)  # transformers' own loss, unpacked
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert sum(len(p.tokens) for p in packed) < 0.5 * sum(
        len(sum(packing.encode(e, tokenizer), [])) for g in groups[:3] for e in g
    )


def test_every_reply_is_supervised_to_its_end(tokenizer: Any, groups: list[list[data.Example]]) -> None:
    for group in groups:
        packed = packing.pack(group, tokenizer, 4096)
        ends = [label for label in packed.labels if label == tokenizer.eos_token_id]
        assert len(ends) == len(group)


def test_a_template_without_end_of_turn_is_refused(tokenizer: Any, groups: list[list[data.Example]]) -> None:
    import copy

    broken = copy.deepcopy(tokenizer)
    broken.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    with pytest.raises(TrainingFailed, match="end-of-turn"):
        packing.pack(groups[0], broken, 4096)


def test_a_group_that_is_too_long_is_an_error_and_is_not_cut(tokenizer: Any, groups: list[list[data.Example]]) -> None:
    with pytest.raises(DataError, match="max_tokens=128"):
        packing.pack(groups[0], tokenizer, 128)


def start(tiny: Path, packed: list[packing.Packed], checkpoint: Path, *overrides: str) -> sft.Training:
    import torch

    recipe = load_recipe("lora-quick", ["schedule.steps=8", "schedule.checkpoint_every_steps=3", *overrides])
    torch.manual_seed(0)
    model = adapter.attach(load_base(tiny, recipe, "cpu"), recipe.lora, catalogue.find(MODEL).target_modules, quantised=False)
    return sft.Training(model, packed, recipe, 2, checkpoint)


def test_an_interrupted_training_resumes_to_the_same_weights(tiny: Path, tokenizer: Any, groups: Any, tmp_path: Path) -> None:
    packed = [packing.pack(group, tokenizer, 4096) for group in groups]
    whole = start(tiny, packed, tmp_path / "whole")
    whole.run(lambda _: None)

    def interrupt(step: sft.Step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(tiny, packed, tmp_path / "cut").run(interrupt)
    resumed = start(tiny, packed, tmp_path / "cut")
    assert resumed.first_step == 5
    steps: list[sft.Step] = []
    resumed.run(steps.append)
    assert [s.step for s in steps] == [6, 7, 8]
    for name, parameter in whole.trained.items():
        assert (parameter - resumed.trained[name]).abs().max() < 1e-6, name


def test_a_loss_that_is_not_finite_ends_the_training(tiny: Path, tokenizer: Any, groups: Any, tmp_path: Path) -> None:
    packed = [packing.pack(group, tokenizer, 4096) for group in groups]
    training = start(tiny, packed, tmp_path / "nan")
    next(iter(training.trained.values())).data.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="loss is nan"):
        training.run(lambda _: None)


def test_data_without_a_supervised_token_is_refused(tiny: Path, tmp_path: Path) -> None:
    silent = packing.Packed([1, 2], [0, 1], [0, 0], [None, None])
    with pytest.raises(TrainingFailed, match="no supervised token"):
        start(tiny, [silent], tmp_path / "none")


def test_an_adapter_without_effect_fails(tiny: Path, tokenizer: Any, groups: Any, tmp_path: Path) -> None:
    packed = [packing.pack(group, tokenizer, 4096) for group in groups]
    training = start(tiny, packed, tmp_path / "untrained")
    with pytest.raises(TrainingFailed, match="changes no logit"):
        adapter.prove_effect(training.model, packed[0].tokens)


def test_the_interrupted_job_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))

    class Impatient(Quiet):
        def step(self, step: sft.Step) -> None:
            super().step(step)
            if step.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    job = Job(MODEL, rehearse=True, pull=False)
    with pytest.raises(KeyboardInterrupt):
        finetune(job, Impatient())
    assert runs.all_runs() == []
    quiet = Quiet()
    run = finetune(job, quiet)
    assert [s.step for s in quiet.steps] == [4, 5, 6]
    assert any("resuming after step 3" in line for line in quiet.lines)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_the_template_lock_refuses_another_template(tokenizer: Any) -> None:
    import copy

    from pipelines.errors import FingerprintMismatch

    locked = template.lock(tokenizer)
    assert len(locked["golden"]) == 4
    template.check(locked, template.render_with(tokenizer), "here")
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("'\n'", "'\n\n'", 1)
    with pytest.raises(FingerprintMismatch, match="golden chat 0"):
        template.check(locked, template.render_with(other), "elsewhere")


def test_the_training_part_never_sees_a_test_model() -> None:
    config = data.load_reader()
    train, whole = data.corpora(config)
    held_out = data.held_out_examples(config, whole)
    titles = {catalogue.find(name).title for name in config.test_models}
    assert {p.model for p in train.passages}.isdisjoint(config.test_models)
    for group in training_groups(config, train, 60, 6, seed=7):
        for e in group:
            assert e.model not in config.test_models
            assert not any(f" {title}?" in e.question or f" {title} " in e.question for title in titles), e.question
    assert {e.model for e in held_out if e.model} == set(config.test_models)
    assert sum(e.truth is not None for e in held_out) > 60
    assert 0.2 < sum(e.truth is None for e in held_out) / len(held_out) < 0.4


def test_training_answers_stand_in_their_cited_passage(groups: list[list[data.Example]]) -> None:
    for e in (e for group in groups for e in group):
        for number in e.citations:
            assert e.answer and e.answer in e.passages[number - 1].text
        assert (e.answer is None) == (not e.citations)


def test_the_recipe_makes_as_many_groups_as_its_steps_take(tokenizer: Any) -> None:
    recipe = load_recipe("lora-quick", ["schedule.steps=4", "schedule.groups_per_step=3", "schedule.max_tokens=4096"])
    assert len(training_set(recipe, tokenizer)) == 12
