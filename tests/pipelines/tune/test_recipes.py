"""Every recipe with every model that can be run, through the whole job on the shrunk architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import catalogue
from pipelines.config import names
from pipelines.errors import ConfigError, RunIncomplete
from pipelines.tune import adapter
from pipelines.tune.finetune import Job, finetune, load_base
from pipelines.tune.recipe import load_recipe
from serving.tuned import adapter_of
from tests.conftest import MODEL, Quiet

MODELS = [catalogue.find(name) for name in (MODEL, "mistral-7b")]  # the others: llmlab rehearse, test_families.py
QUICK = {("lora-quick", MODEL), ("dora", MODEL), ("full", MODEL), ("dpo", MODEL), ("qlora", "mistral-7b")}  # each method once
MATRIX = [
    pytest.param(recipe, m.name, marks=[] if (recipe, m.name) in QUICK else pytest.mark.slow)
    for recipe in names("recipes") for m in MODELS
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "model"), MATRIX)
def test_every_recipe_goes_through_with_every_model(
    recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))
    quiet = Quiet()
    run = finetune(Job(model, recipe, ("schedule.rows_per_step=2",), rehearse=True, pull=False), quiet)
    method = load_recipe(recipe).method
    card = run.json("proof.json")
    assert card == quiet.cards[-1] and card["logit_change"] > 1e-3
    assert (run.path / "model" / "model.safetensors").is_file() == (method == "full")
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file() == (method != "full")
    assert (run.path / "adapter.gguf").is_file() == (method in ("lora", "qlora", "dpo"))
    assert (card["servable"]["llamacpp"] == "yes") == (run.path / "adapter.gguf").is_file()
    if method in ("full", "dora"):
        with pytest.raises(RunIncomplete, match="cannot be served beside its base"):
            adapter_of(run, model)
    else:
        assert adapter_of(run, model).gguf.is_file()
    assert run.rehearsal and [s.step for s in quiet.steps][-1] == 6


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("full", "lora={rank: 4, alpha: 8, dropout: 0.0}", "takes no lora section"),
        ("lora", "lora=null", "takes a lora section"),
        ("dpo", "preference=null", "preference section"),
        ("lora", "preference={beta: 0.1}", "preference section"),
        ("lora", "schedule.epochs=1", "either steps or epochs"),
        ("qlora", "schedule.shard_weights=true", "shard_weights goes with methods lora and dora"),
    ],
)
def test_parts_that_do_not_fit_the_method_are_refused(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [override])


def test_data_that_is_neither_set_nor_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="reader"):
        finetune(Job(MODEL, "lora", ("data=readr",), rehearse=True), Quiet())


def test_a_target_that_is_no_projection_is_refused(tiny: Path) -> None:
    """PEFT itself would train the others and say nothing."""
    recipe = load_recipe("lora")
    assert recipe.lora
    with pytest.raises(ConfigError, match="has no projection named query_proj") as caught:
        adapter.attach(load_base(tiny, "cpu", quantised=False), recipe.lora, ["q_proj", "query_proj"], quantised=False)
    assert "down_proj, gate_proj" in str(caught.value)
