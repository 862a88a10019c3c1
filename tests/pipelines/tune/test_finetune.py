"""The tuning job on real parts: a few steps of SmolLM2-135M, and Mistral rehearsed in NF4."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelines import catalogue, runs, weights
from pipelines.errors import ConfigError, RehearsalRefused, Rehearsed, WeightsMissing
from pipelines.runs import Run
from pipelines.tune import data, template
from pipelines.tune.finetune import Job, finetune
from pipelines.tune.groups import training_groups
from pipelines.tune.training import Step
from tests.conftest import MODEL, Quiet


def test_a_run_holds_everything_it_promises(tuned_run: Run) -> None:
    names = {str(p.relative_to(tuned_run.path)) for p in tuned_run.path.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "loss.png", "template_lock.json", "manifest.json", "proof.json",
        "plan.json", "adapter.gguf",
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


@pytest.mark.slow
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


def test_the_interrupted_job_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))

    class Impatient(Quiet):
        def step(self, step: Step) -> None:
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
    other.chat_template = tokenizer.chat_template.replace(r"'\n'", r"'\n\n'", 1)
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
