"""The catalogue on the screen: filters, the document's table, the Pareto front, and the matrix of rehearsals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from labs import figures, rehearse
from labs.cli import app
from pipelines import catalogue
from pipelines.catalogue import all_models, find
from pipelines.errors import ConfigError, ExportFailed, TrainingFailed


def llmlab(*arguments: str) -> Result:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def listed(*arguments: str) -> list[str]:
    lines = [line for line in llmlab("models", *arguments).output.splitlines() if line.startswith("│")]
    return [cell for line in lines if (cell := line.split("│")[1].strip()) in {m.name for m in all_models()}]


def test_models_are_filtered_and_sorted() -> None:
    assert listed() == [m.name for m in all_models()]
    assert set(listed("--open")) == {m.name for m in all_models() if m.runnable}
    small = listed("--open", "--max-memory", "1GB", "--sort", "memory")
    assert small == ["smollm2-135m", "smollm2-360m", "qwen-2.5-0.5b", "gemma-3-1b", "qwen-2.5-1.5b", "smollm2-1.7b"]
    assert listed("--license", "research-only") == ["mistral-large", "qwen-2.5-3b"]
    assert {"gemini-2.0-pro", "llama-4", "llama-4-maverick"} == set(listed("--context", "1M"))
    assert listed("--sort", "cost")[:3] == ["phi-3-medium", "llama-3.2-11b", "gpt-3.5-turbo"]


def test_figures_are_read_from_the_statements() -> None:
    assert figures.context_of(find("claude-2")) == 100_000 and figures.context_of(find("gemini-2.0-pro")) == 2_000_000
    assert figures.context_of(find("gpt-3.5-turbo")) == 16_000
    assert figures.cost_of(find("gpt-4o")) == pytest.approx((3 * 2.5 + 10) / 4) and figures.cost_of(find("gemma")) is None
    assert (
        figures.tokens("32k") == 32_000 and figures.size_bytes("800MB") == 800_000_000 and figures.size_bytes("24") == 24 * 10**9
    )
    for read in (figures.tokens, figures.size_bytes):
        for wrong in ("", "-3", "many", "0", "3 apples"):
            with pytest.raises(ConfigError):
                read(wrong)


def test_the_front_holds_what_no_other_beats() -> None:
    every = {row.name: row for row in figures.table_of(all_models())}
    assert set(every) == {"gpt-4o", "mistral-large", "llama-3.2-11b", "phi-3-medium", "gpt-3.5-turbo"}
    best = {row.name for row in figures.front(list(every.values()))}
    assert best == {"gpt-4o", "mistral-large", "llama-3.2-11b", "phi-3-medium"}, (
        "GPT-3.5 costs more and knows less than LLaMA 3.2"
    )


def test_choosing_ranks_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    done = llmlab("choose", "--max-cost", "1", "--min-accuracy", "0.41", "--plot", str(picture))
    told = json.loads(done.output.strip().splitlines()[-1])
    assert told["ranked"] == ["llama-3.2-11b", "phi-3-medium"] and told["measured"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert json.loads(llmlab("choose", "--max-latency", "0.1", "--plot", str(picture)).output.splitlines()[-1])["ranked"] == []


def test_show_tells_how_a_model_is_run() -> None:
    shown = llmlab("show", "gemma-3").output
    for words in ("google/gemma-3-4b-it", "acceptable-use", "vision_tower", "start_of_turn", "text, image"):
        assert words in shown
    assert (
        "not pinned" in llmlab("show", "mpt-7b").output
        and "bedrock_converse:anthropic.claude-v2:1" in llmlab("show", "claude-2.1").output
    )


def test_the_matrix_is_that_of_the_kept_results() -> None:
    written = rehearse.MATRIX.read_text(encoding="utf-8")
    assert written == rehearse.matrix(), "llmlab rehearse writes it"
    rows = [line.split("|")[1].strip() for line in written.splitlines() if line.startswith("| ")][1:]
    assert rows == [m.name for m in all_models() if m.runnable]
    assert "| fails" not in written


def test_the_catalogue_names_the_engines_that_rehearsals_went_through() -> None:
    for name, result in rehearse.kept().items():
        serving, cells = find(name).serving, result["cells"]
        assert serving
        assert ("llamacpp" in serving.engines) == (cells["gguf"]["state"] == "works"), name
        assert "vllm" in serving.engines or cells["vllm"]["state"] != "works", name
        assert "vllm" not in serving.engines or "not supported anymore" not in cells["vllm"]["detail"], name


def test_a_step_that_does_not_work_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> None:
        raise error

    def cell(error: Exception) -> rehearse.Cell:
        return rehearse._tried(lambda: raising(error))  # type: ignore[arg-type, return-value]

    assert cell(ExportFailed("no | such\nmodel")) == rehearse.Cell("not supported", "no / such model")
    assert cell(TrainingFailed("nothing")).state == cell(RuntimeError("boom")).state == "fails"
    monkeypatch.setattr(rehearse, "_tuned", lambda *_: raising(RuntimeError("no memory")))
    cells = rehearse.life(find("smollm2-135m"))
    assert cells["lora"] == rehearse.Cell("fails", "RuntimeError: no memory") and cells["gguf"].state == "not tried"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("(E pid=2) ERROR ValueError: no head of 7\nRuntimeError: Engine core initialization failed. See above.\n",
         "ValueError: no head of 7"),
        ("ValidationError: 1 validation error\n  Value error, no processor [type=value_error, input_value=1]\n    For more\n",
         "Value error, no processor"),
        ("ModuleNotFoundError: No module named 'torchvision'\nValidationError: 1 validation error for ModelConfig\n"
         "  Value error, Model architecture A failed to be inspected.\n",
         "ModuleNotFoundError: No module named 'torchvision'"),
        ("it just ended\n", ""),
    ],
)  # fmt: skip
def test_vllm_is_quoted_with_the_error_that_ended_it(log: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text(log, encoding="utf-8")
    assert rehearse._reason(tmp_path / "engine.log") == (f"vLLM: {reason}" if reason else "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-3-1b"])
def test_a_model_is_taken_through_its_life(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rehearse, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(rehearse, "MATRIX", tmp_path / "README.md")
    monkeypatch.setattr(rehearse.hardware, "vllm_is_installed", lambda: False)
    cells = rehearse.rehearse([catalogue.find(name)], lambda _: None)[name]
    assert {cells[step].state for step in ("lora", "qlora", "merged", "generates", "gguf")} == {"works"}, cells
    assert (cells["images"].state, cells["vllm"].state) == ("-", "not tried")
    assert f"| {name} | gemma3_text | works |" in (tmp_path / "README.md").read_text()
