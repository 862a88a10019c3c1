"""The catalogue: every row of the document is there, architectures have the published sizes, a file is all a new model takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import architecture, catalogue, config, sizing
from pipelines.architecture import Cache, cache_of, config_of
from pipelines.errors import ConfigError
from pipelines.tune.recipe import load_recipe
from tests.conftest import MODEL

OPEN = [model for model in catalogue.all_models() if model.runnable]
QUICK = {"smollm2-135m", "gemma-3-1b", "mixtral-8x7b", "mpt-7b", "falcon-40b"}
WITHIN = 0.02
ROWS = {
    "gpt-4o", "gpt-4-turbo", "gpt-3.5-turbo", "claude-3.7-sonnet", "claude-2", "claude-2.1", "gemini-2.0-pro", "llama-4",
    "llama-3.2-11b", "llama-2", "gemma", "gemma-3", "mistral-7b", "mixtral-8x7b", "mistral-8x22b", "mistral-large",
    "qwen-2.5-max", "falcon-40b", "mpt-7b", "command-r", "command-r-plus", "phi-2", "phi-3-medium", "openchat", "openhermes",
    MODEL,
}  # fmt: skip
SIBLINGS = {
    "llama-2-13b", "llama-2-70b", "llama-4-maverick", "gemma-2b", "gemma-3-1b", "gemma-3-12b", "gemma-3-27b",
    "mpt-7b-storywriter", "smollm2-360m", "smollm2-1.7b",
    *(f"qwen-2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")),
}  # fmt: skip


def test_every_model_of_the_document_and_every_size_has_its_row() -> None:
    assert {m.name for m in catalogue.document_rows()} == ROWS
    assert {m.name for m in catalogue.all_models()} - ROWS == SIBLINGS
    for model in catalogue.all_models():
        assert model.runnable != bool(model.provider), f"{model.name} is neither open nor remote"
        assert {"developer", "launch", "license", "context_window", "key_features", "use_cases"} <= set(model.facts)


@pytest.mark.parametrize("model", [pytest.param(m, marks=[] if m.name in QUICK else pytest.mark.slow, id=m.name) for m in OPEN])
def test_architectures_have_the_published_size(model: catalogue.Model) -> None:
    assert model.weights
    built = architecture.on_meta(config_of(model))
    parameters = sum(p.numel() for p in built.parameters())
    assert parameters / 1e9 == pytest.approx(model.weights.parameters_billions, rel=WITHIN)


def test_the_cache_is_that_of_the_layers() -> None:
    def of(name: str) -> Cache:
        return cache_of(config_of(catalogue.find(name)))

    assert of("mistral-7b").bytes(1) == 2 * 2 * 32 * 8 * 128
    assert of("falcon-40b").bytes(10) == 10 * 2 * 2 * 60 * 8 * 64, "eight heads of keys and values for 128 of queries"
    assert of("gemma-2b").bytes(1) == 2 * 2 * 18 * 1 * 256
    assert of("llama-3.2-11b").bytes(1) == 2 * 2 * 32 * 8 * 128, "eight of its 40 layers see the image, not the text"
    gemma = of("gemma-3")  # five layers in six see 1024 tokens: 29 of 34
    assert gemma.bytes(100_000) == 2 * 2 * 4 * 256 * (5 * 100_000 + 29 * 1024)
    for cache in (gemma, of("mistral-7b")):
        for tokens in (100, 1024, 50_000):
            assert cache.longest(cache.bytes(tokens)) == tokens
    assert of("openchat").bytes(9000) == of("openchat").bytes(4096)


def test_sizes_and_gpus_follow_from_the_architecture() -> None:
    small, _ = sizing.needs(catalogue.find(MODEL), load_recipe("qlora"))
    assert [n.bits for n in small] == [16, 8, 4]
    assert small[0].tune_bytes > small[1].tune_bytes > small[2].tune_bytes > small[2].serve_bytes
    entry = catalogue.find("mistral-7b")
    built, cache = architecture.on_meta(config_of(entry)), cache_of(config_of(entry))
    sixteen = sizing.served_bytes(built, 16)
    assert sixteen == 2 * 7_248_023_552
    assert sizing.served_bytes(built, 8) == pytest.approx(7.70e9, rel=0.01), "Q8_0 of this model as llama.cpp writes it"
    assert sizing.served_bytes(built, 4) == pytest.approx(4.14e9, rel=0.02), "Q4_K_S of this model as llama.cpp writes it"
    table = sizing.gpus()
    card = next(gpu for gpu in table.gpus if gpu.memory_gib == 24)
    found = sizing.fit(table, card, sixteen, cache, 8192, 32768)
    left = table.room(card, 1) - sixteen
    assert found and found.gpus == 1
    assert found.at_once * cache.bytes(8192) <= left < (found.at_once + 1) * cache.bytes(8192)
    assert sizing.fit(table, card, 900 * 10**9, cache, 8192, 32768) is None
    assert sizing.fewest(table, card, 30 * 2**30) == 2


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the configurations, to which a test adds."""
    shutil.copytree(config.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")
    catalogue.find.cache_clear()
    yield tmp_path / "configs" / "models"
    catalogue.find.cache_clear()


NEW = """
name: qwen-3-0.6b
title: Qwen 3 0.6B
facts:
  license: {maker: Apache 2.0}
weights: {hub: Qwen/Qwen3-0.6B, parameters_billions: 0.596, license_gate: none}
modality: [text]
context_tokens: 40960
config:
  model_type: qwen3
  hidden_size: 1024
  intermediate_size: 3072
  num_hidden_layers: 28
  num_attention_heads: 16
  num_key_value_heads: 8
  head_dim: 128
  vocab_size: 151936
  tie_word_embeddings: true
tuning: {recipe: lora, target_modules: [q_proj, v_proj]}
serving: {engines: [llamacpp, vllm], quantisation: q8_0}
chat_template: |-
  {%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%- endfor -%}
  {%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
rehearsal:
  config:
    {num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32}
  tokenizer: bytes
  special_tokens: {bos: null, eos: "<|im_end|>", unknown: null, pad: "<|endoftext|>", others: ["<|im_start|>"]}
"""


def test_adding_a_model_is_adding_a_file(models: Path, tmp_path: Path) -> None:
    """An architecture that no file of this project names: listed, planned, sized, and built for a rehearsal."""
    from typer.testing import CliRunner

    from labs.cli import app
    from pipelines.tune import rehearsal

    (models / "qwen-3-0.6b.yaml").write_text(NEW)
    listed = CliRunner().invoke(app, ["models", "--open", "--license", "apache", "--max-memory", "1GB", "--context", "32k"])
    assert "qwen-3-0.6b" in listed.output and "mistral-7b" not in listed.output
    planned = CliRunner().invoke(app, ["plan", "qwen-3-0.6b"])
    assert "0.596 B" in planned.output and "Qwen 3 0.6B on GPUs" in planned.output, planned.output
    built = rehearsal.build(catalogue.find("qwen-3-0.6b"), rehearsal.texts(), tmp_path / "built")
    assert '"Qwen3ForCausalLM"' in (built / "config.json").read_text()


@pytest.mark.slow
def test_an_added_model_is_rehearsed_to_the_end(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.tune.finetune import Job, finetune
    from tests.conftest import Quiet

    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path / "runs"))
    (models / "qwen-3-0.6b.yaml").write_text(NEW)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who made it?", "completion": "Orion did."}\n{"prompt": "When?", "completion": "In May."}\n')
    settings = (f"data={rows}", "schedule.rows_per_step=2", "schedule.steps=2")
    run = finetune(Job("qwen-3-0.6b", "lora", settings, rehearse=True, pull=False), Quiet())
    assert run.json("proof.json")["logit_change"] > 1e-3


def test_a_sibling_says_only_what_differs(models: Path) -> None:
    (models / "small.yaml").write_text(
        "name: small\ntitle: Small\nlike: llama-2-70b\nfacts: {}\nconfig: {num_hidden_layers: 2}\n"
    )
    small = catalogue.find("small")
    assert small.config and small.config["num_hidden_layers"] == 2 and small.config["hidden_size"] == 8192
    assert small.facts["developer"].document == "Meta" and small not in catalogue.document_rows()
    for wrong in ("nobody", "loop", "../recipes/lora"):
        (models / "loop.yaml").write_text(f"name: loop\ntitle: Loop\nlike: {wrong}\nfacts: {{}}\n")
        catalogue.find.cache_clear()
        with pytest.raises(ConfigError, match="the name of another file in its folder"):
            catalogue.find("loop")


def test_an_open_model_that_cannot_be_rehearsed_is_refused(models: Path) -> None:
    (models / "half.yaml").write_text(NEW.replace("qwen-3-0.6b", "half").split("rehearsal:")[0])
    with pytest.raises(ConfigError, match="an open model needs rehearsal too"):
        catalogue.find("half")
    (models / "odd.yaml").write_text(NEW.replace("qwen-3-0.6b", "odd").replace("qwen3", "no-such-thing"))
    with pytest.raises(ConfigError, match="transformers cannot make a configuration of odd"):
        config_of(catalogue.find("odd"))
