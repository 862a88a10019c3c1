"""A tuned run as a model of its own: merged, converted, quantised, and the same model all along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError, ExportFailed, UnknownName
from pipelines.export import job
from pipelines.export.convert import CONVERTER
from pipelines.export.divergence import compare, reason
from pipelines.export.modelfile import go_template
from pipelines.export.quantise import blocks, choices, type_of
from pipelines.runs import Run
from pipelines.tune.finetune import Job, finetune
from tests.conftest import MODEL, Quiet


def silent(stage: str, done: int, total: int) -> None:
    assert done <= total, stage


@pytest.fixture(scope="module")
def exported(tuned_run: Run) -> Run:
    return job.export(tuned_run, "q8_0", silent)


@pytest.mark.slow
def test_merging_and_converting_change_nothing_and_eight_bits_little(exported: Run) -> None:
    found = exported.json(job.DIVERGENCE_FILE)
    assert found["merged"]["mean"] < 1e-5 and found["merged"]["same_first_choice"] == 1
    assert found["converted"]["mean"] < 1e-3 and found["converted"]["same_first_choice"] > 0.9
    assert 1e-6 < found["quantised"]["mean"] < 0.05
    assert found["merged"]["prompts"] >= 10


@pytest.mark.slow
def test_the_exported_run_holds_both_forms_and_names_what_it_is_made_of(exported: Run, tuned_run: Run) -> None:
    import gguf
    from transformers import AutoTokenizer

    names = {str(p.relative_to(exported.path)) for p in exported.path.rglob("*") if p.is_file()}
    file = f"{MODEL}-q8_0.gguf"
    assert {"Modelfile", "divergence.json", "template_lock.json", "model/model.safetensors", file} < names
    assert not any(name.endswith("f16.gguf") for name in names)
    assert exported.inputs == ({"kind": "finetune", "id": tuned_run.id, "fingerprint": tuned_run.fingerprint},)
    reader = gguf.GGUFReader(exported.path / file)
    tokenizer = AutoTokenizer.from_pretrained(exported.path / "model")
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert f"FROM ./{file}\n" in (exported.path / "Modelfile").read_text()
    assert (exported.path / file).stat().st_size < 0.4 * (exported.path / "model" / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_the_exported_model_is_served_in_place_of_its_base(exported: Run) -> None:
    import httpx

    from serving.launch import running
    from serving.settings import load_serve_config

    config = load_serve_config(
        "default", ["engine=llamacpp", "port=0", "engine_port=0", "context_tokens=1024", "slots.llamacpp=1"]
    )
    with running(MODEL, config, adapter=exported.id, say=lambda _: None) as server, httpx.Client(base_url=server.url) as client:
        models = client.get("/v1/models").json()["data"]
        assert [m["id"] for m in models if m["task"] == "generate"] == [f"{MODEL}-tuned"]
        assert exported.id in str(models[0])
        body = {"model": f"{MODEL}-tuned", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        pytest.param("mistral-7b", "qlora", marks=pytest.mark.slow),
        pytest.param(MODEL, "full", marks=pytest.mark.slow),
        pytest.param(MODEL, "dora", marks=pytest.mark.campaign),
    ],
)
def test_every_method_can_be_exported(model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))
    run = finetune(Job(model, recipe, ("schedule.rows_per_step=2", "optimiser.learning_rate=0.01"), rehearse=True), Quiet())
    made = job.export(run, "q4_k", silent)
    assert made.rehearsal and made.kind == job.KIND
    assert list(made.path.glob("*-q4_k.gguf"))
    assert made.facts["kl_merged"] < (0.5 if recipe == "qlora" else 1e-4)
    assert made.facts["kl_converted"] < 1e-3


@pytest.mark.slow
def test_a_step_that_moves_the_model_too_far_fails_and_leaves_no_run(
    tuned_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    from pipelines.export import convert

    def damaged(folder: Path, out: Path, pre_tokenizer: str = "") -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.3.self_attn.q_proj.weight"
        tensors[name] = tensors[name][::-1].copy()  # as a converter would that permutes the heads wrongly
        save_file(tensors, file, metadata={"format": "pt"})
        whole(folder, out, pre_tokenizer)

    whole = convert.to_gguf
    monkeypatch.setattr(convert, "to_gguf", damaged)
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path))
    with pytest.raises(ExportFailed, match="the converted model is another model"):
        job.export(tuned_run, "f16", silent)
    assert not list(tmp_path.glob("export/*/[0-9]*"))


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(exported: Run, tuned_run: Run) -> None:
    with pytest.raises(UnknownName, match="one of f16, q8_0"):
        job.export(tuned_run, "q3", silent)
    with pytest.raises(ConfigError, match="is export of"):
        job.export(exported, "f16", silent)


def test_without_the_converter_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.export import convert

    assert (CONVERTER / "convert_hf_to_gguf.py").is_file()
    monkeypatch.setattr(convert, "CONVERTER", tmp_path)
    with pytest.raises(ExportFailed, match="make setup"):
        convert.to_gguf(tmp_path, tmp_path / "x.gguf")


def test_a_folder_that_is_no_model_is_explained(tmp_path: Path) -> None:
    from pipelines.export import convert

    (tmp_path / "config.json").write_text('{"architectures": ["UnheardOf"], "model_type": "unheard"}')
    with pytest.raises(ExportFailed, match="cannot be converted to GGUF"):
        convert.to_gguf(tmp_path, tmp_path / "x.gguf")


def test_the_help_names_every_quantisation() -> None:
    from typer.testing import CliRunner

    from labs.cli import app

    shown = CliRunner().invoke(app, ["export", "--help"]).output
    assert all(name in shown for name in choices())


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K"])
def test_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    """The package quantises the types in blocks of 32 itself, and reads all of them."""
    import gguf
    import numpy as np

    rows = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    made = blocks(rows, kind)
    back = gguf.quants.dequantize(made, number)
    bits = int(kind[1])
    assert np.abs(back - rows).mean() < 1.6 * np.abs(rows).max() / 2**bits
    if kind in ("F16", "Q8_0", "Q4_1", "Q5_1"):  # of the others llama.cpp rounds ties another way
        assert (made == gguf.quants.quantize(rows, number).view(np.uint8)).mean() > 0.999


def test_rows_that_256_does_not_divide_take_blocks_of_32() -> None:
    assert type_of("blk.0.ffn_down.weight", (576, 1536), "q4_k") == "Q4_K"
    assert type_of("blk.0.attn_q.weight", (576, 576), "q4_k") == "Q5_0"
    assert type_of("token_embd.weight", (49152, 576), "q4_0") == "Q8_0"
    assert type_of("token_embd.weight", (49152, 512), "q4_0") == "Q6_K"
    assert type_of("blk.0.attn_norm.weight", (576,), "q4_0") is None


@pytest.mark.parametrize("tensor", ["blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "position_embd.weight"])
def test_what_llamacpps_own_quantiser_leaves_alone_stays_as_it_is(tensor: str) -> None:
    """Norms of single heads (Command R+), the gates of experts (Mixtral) and learnt positions are matrices too."""
    assert type_of(tensor, (256, 256), "q4_k") is None


@pytest.mark.parametrize(
    ("stderr", "why"),
    [
        ("0.1 I loading\n0.2 E llama_model_load: error loading model: wrong number of tensors\n0.3 E exiting\n",
         "llama_model_load: error loading model: wrong number of tensors"),
        ("0.1 I loading\n/build/ggml-cpu/binary-ops.cpp:135: binary_op: unsupported types: src1: q5_0\n\n"
         "warning: process 1 is traced\n360\t../csu/libc-start.c: No such file or directory.\n",
         "binary_op: unsupported types: src1: q5_0"),
        ("killed\n", "killed"), ("", "no message"),
    ],
)  # fmt: skip
def test_the_line_that_says_why_llamacpp_ended_is_found(stderr: str, why: str) -> None:
    assert reason(stderr) == why


def test_divergence_is_that_of_scipy() -> None:
    import numpy as np
    from scipy.special import log_softmax
    from scipy.stats import entropy

    drawn = np.random.default_rng(1)
    p, q = (log_softmax(drawn.normal(size=(5, 40)) * 3, axis=1) for _ in range(2))
    found = compare(p, q)
    expected = [entropy(np.exp(a), np.exp(b)) for a, b in zip(p, q, strict=True)]
    assert found.mean == pytest.approx(np.mean(expected)) and found.worst == pytest.approx(np.max(expected))
    assert compare(p, p).mean == 0 and compare(p, p).same_first_choice == 1


def go(template: str, system: str, prompt: str, response: str) -> str:
    """Do what Go's text/template does with the few actions that are used."""
    chosen = re.sub(r"{{ if \.System }}(.*?){{ else }}(.*?){{ end }}", lambda m: m[1] if system else m[2], template, flags=re.S)
    for name, value in (("System", system), ("Prompt", prompt), ("Response", response)):
        chosen = chosen.replace(f"{{{{ .{name} }}}}", value)
    assert "{{" not in chosen
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, "mistral-7b"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ollamas_template_says_what_the_chat_template_says(model: str, system: str, exported: Run) -> None:
    from transformers import AutoTokenizer

    from pipelines import catalogue
    from pipelines.tune import rehearsal

    real = model == MODEL
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.path / "model") if real else rehearsal.train_tokenizer(
        catalogue.find(model), rehearsal.texts())  # fmt: skip
    turns = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": "Who made it?"}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": "Orion."})
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    template = go_template(tokenizer)
    prompt = go(template.partition("{{ .Response }}")[0], system, "Who made it?", "")  # up to where Ollama lets the model write
    assert prompt.removeprefix("<s>") == asked.removeprefix("<s>")
    written = answered.removeprefix(asked).partition(str(tokenizer.eos_token))[0]  # of some families a space is part of it
    assert written.strip() == "Orion."
    assert go(template, system, "Who made it?", written).removeprefix("<s>") == answered.removeprefix("<s>")
