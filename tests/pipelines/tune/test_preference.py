"""DPO: the reference is the supervised adapter, the first loss is ln 2, and the formula is that of the paper."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ROOT
from pipelines.errors import ConfigError, TrainingFailed
from pipelines.rag.answer import ABSTENTION
from pipelines.runs import Run
from pipelines.tune import preference
from pipelines.tune.files import TRANSCRIPT
from pipelines.tune.finetune import Job, finetune
from pipelines.tune.packing import encode_pair, tree
from pipelines.tune.preference import Preferences, check_first_loss, log_probabilities, reader_pairs
from pipelines.tune.recipe import load_recipe
from pipelines.tune.training import Training
from tests.conftest import MODEL, Quiet
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe

HARMLESS = Path(os.environ.get("LLMLAB_DATA") or ROOT.parent / "shared" / "data") / "hh_rlhf_harmless_test.jsonl.gz"


def test_the_loss_is_that_of_the_paper(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    model = tiny_model(tiny, tiny_recipe())
    rows = reader_pairs(load_recipe("dpo", ["schedule.steps=2", "schedule.rows_per_step=3"]))
    pairs = [tree(encode_pair(row, tokenizer)) for row in rows]
    objective = Preferences(model, [pairs], 0.3, 2, tmp_path / "reference.json")
    with torch.no_grad():
        assert float(objective.total(model, pairs)) / len(rows) == pytest.approx(math.log(2), abs=1e-6)
        reference = [unpacked(model, row, tokenizer) for row in rows]
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        policy = [unpacked(model, row, tokenizer) for row in rows]
        expected = [
            -math.log(1 / (1 + math.exp(-0.3 * ((p[0] - r[0]) - (p[1] - r[1]))))) for p, r in zip(policy, reference, strict=True)
        ]
        assert float(objective.total(model, pairs)) == pytest.approx(sum(expected), rel=1e-4)
        assert log_probabilities(model, pairs, 2).tolist() == pytest.approx([x for p in policy for x in p], rel=1e-4)


def unpacked(model: Any, row: Any, tokenizer: Any) -> tuple[float, float]:
    """(chosen, rejected) log-probabilities by transformers' own loss, one row at a time."""
    import torch

    found = []
    for encoded in encode_pair(row, tokenizer):
        labels = [-100, *(-100 if label is None else label for label in encoded.labels)]
        loss = model(input_ids=torch.tensor([[*encoded.tokens, 0]]), labels=torch.tensor([labels])).loss
        found.append(-float(loss) * encoded.supervised)
    return found[0], found[1]


def test_another_reference_is_refused() -> None:
    check_first_loss(math.log(2))
    with pytest.raises(TrainingFailed, match="the reference is not the model"):
        check_first_loss(0.71)


def test_pairs_of_the_reader_are_right_and_careless() -> None:
    rows = reader_pairs(load_recipe("dpo", ["schedule.steps=5"]))
    assert len(rows) == 20
    assert all(row.rejected and row.rejected != row.reply for row in rows)
    assert any(row.reply == ABSTENTION for row in rows) and any(row.rejected == ABSTENTION for row in rows)


def test_preferences_are_learnt(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(tiny, tiny_recipe())
    pairs = [
        tree(encode_pair(row, tokenizer))
        for row in reader_pairs(load_recipe("dpo", ["schedule.steps=1", "schedule.rows_per_step=8"]))
    ]
    steps, recipe = [pairs] * 20, load_recipe("dpo", ["optimiser.learning_rate=0.002"])
    objective = Preferences(model, steps, 0.1, 2, tmp_path / "reference.json")
    losses: list[float] = []
    Training(model, steps, recipe, objective, tmp_path / "checkpoint").run(lambda step: losses.append(step.loss))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    kept = json.loads((tmp_path / "reference.json").read_text())
    model.eval()
    again = Preferences(model, steps, 0.1, 2, tmp_path / "reference.json")
    assert [again.reference[p] for p in pairs] == kept, "the reference is that of the first start, not of the tuned model"


@pytest.mark.slow
def test_the_job_goes_on_with_the_adapter_of_the_supervised_run(tuned_run: Run) -> None:
    quiet = Quiet()
    run = finetune(Job(MODEL, "dpo", ("schedule.steps=2", "schedule.rows_per_step=2"), start=tuned_run.id, pull=False), quiet)
    assert quiet.steps[0].loss == pytest.approx(math.log(2), abs=1e-3)
    assert run.inputs[0]["id"] == tuned_run.id
    assert (run.path / "adapter.gguf").is_file() and (run.path / "reference.json").is_file()


def test_without_a_supervised_run_it_says_what_to_make_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))
    with pytest.raises(ConfigError, match="no supervised run") as caught:
        finetune(Job(MODEL, "dpo", pull=False), Quiet())
    assert "make finetune MODEL=smollm2-135m" in str(caught.value)


def no_turn_is_empty(line: str) -> bool:
    return all(turn.strip() for text in json.loads(line).values() for turn in TRANSCRIPT.split(text)[2::2])


def test_harmless_pairs_are_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HARMLESS.is_file():
        pytest.skip(f"{HARMLESS.name} is not here")
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path / "runs"))
    with gzip.open(HARMLESS, "rt", encoding="utf-8") as stream:
        lines = [line for line in stream if len(line) < 900 and no_turn_is_empty(line)][:48]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    assert "rejected" in json.loads(lines[0])
    quiet = Quiet()
    overrides = (f"data={file}", "schedule.steps=null", "schedule.epochs=1", "schedule.max_tokens=4096")
    run = finetune(Job(MODEL, "dpo", overrides, rehearse=True, pull=False), quiet)
    assert run.rehearsal and next(s for s in quiet.steps if s.rows <= 16).loss > 0
    assert preference.REFERENCE_FILE in run.json("manifest.json")["files"]
