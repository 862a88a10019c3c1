"""The base that llama.cpp serves: the packaged file, or one that is made once of safetensors in the catalogue's quantisation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines import catalogue
from pipelines.catalogue import Model
from pipelines.errors import DiskFull, ExportFailed, WeightsMissing
from pipelines.export import base
from pipelines.export.base import base_gguf
from pipelines.export.divergence import compare, of_llamacpp, of_transformers
from pipelines.weights import hf_directory, packaged_gguf
from tests.conftest import MODEL

PROMPTS = [[1, 4093, 198], [504, 3575, 282, 4649, 314], [28, 732, 28, 1838, 28]]


def model_in(quantisation: str, name: str = MODEL) -> Model:
    entry = catalogue.runnable(name)
    return entry.model_copy(update={"serving": entry.serving.model_copy(update={"quantisation": quantisation})})


@pytest.fixture(scope="module")
def plain() -> Path:
    """The weights as transformers reads them, in the cache that all tests share."""
    return hf_directory(catalogue.runnable(MODEL))


@pytest.fixture
def models(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001 - found before it is hidden
    """An empty cache of models."""
    monkeypatch.setenv("LLMLAB_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def reference(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return of_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PROMPTS)


def unexpected(line: str) -> None:
    pytest.fail(line)


def test_a_packaged_file_in_the_quantisation_is_taken_as_it_is(models: Path) -> None:
    packaged = packaged_gguf(catalogue.runnable(MODEL))
    assert packaged and base_gguf(model_in("q4_1"), pull=False, say=unexpected) == packaged
    assert not models.exists()


def test_of_a_packaged_file_in_another_one_it_is_made_once(models: Path, plain: Path) -> None:
    said: list[str] = []
    made = base_gguf(model_in("q8_0"), pull=False, say=said.append)
    assert str(made) in said[0] and len(said) == 1 and made.parent == models / MODEL / base.FOLDER
    assert base_gguf(model_in("q8_0"), pull=False, say=unexpected) == made
    assert [path.name for path in made.parent.iterdir()] == [made.name], "nothing else is left"
    assert compare(reference(plain), of_llamacpp(made, PROMPTS)).mean < 0.02


@pytest.mark.slow
def test_of_safetensors_it_is_made_once_and_anew_of_changed_files(models: Path, plain: Path) -> None:
    shutil.copytree(plain, models / MODEL)
    said: list[str] = []
    made = base_gguf(model_in("q8_0"), pull=False, say=said.append)
    assert str(made) in said[0] and len(said) == 1
    assert base_gguf(model_in("q8_0"), pull=False, say=unexpected) == made
    assert [path.name for path in (models / MODEL / base.FOLDER).iterdir()] == [made.name], "nothing else is left"
    found = compare(reference(plain), of_llamacpp(made, PROMPTS))
    assert 0 < found.mean < 0.02 and found.same_first_choice == 1
    os.utime(models / MODEL / "config.json", (1, 1))
    anew = base_gguf(model_in("q8_0"), pull=False, say=said.append)
    assert anew != made and anew.read_bytes() == made.read_bytes() and len(said) == 2


def test_weights_that_are_not_here_are_named_with_the_way_to_get_them(models: Path) -> None:
    with pytest.raises(WeightsMissing, match="mistral-7b") as caught:
        base_gguf(catalogue.runnable("mistral-7b"), pull=False, say=unexpected)
    assert str(models / "mistral-7b") in str(caught.value)


def test_a_full_disk_leaves_nothing_behind(models: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, out: Path) -> None:  # noqa: ARG001 - the signature of to_gguf
        out.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    shutil.copytree(plain, models / MODEL)
    monkeypatch.setattr(base, "to_gguf", full)
    with pytest.raises(DiskFull, match="no space left"):
        base_gguf(model_in("q8_0"), pull=False, say=lambda _: None)
    assert not list((models / MODEL / base.FOLDER).iterdir())


def test_a_folder_that_cannot_be_converted_is_explained(models: Path) -> None:
    placed = models / MODEL
    placed.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (placed / name).write_text("{}", encoding="utf-8")
    (placed / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportFailed, match="cannot be converted"):
        base_gguf(model_in("q8_0"), pull=False, say=lambda _: None)
    assert not list((placed / base.FOLDER).iterdir())
