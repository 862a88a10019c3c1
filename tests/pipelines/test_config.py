from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import catalogue
from pipelines.config import CONFIGS, load, named, names
from pipelines.errors import ConfigError, UnknownName
from pipelines.rag.embedders import EmbedderConfig
from pipelines.rag.index import RagConfig
from pipelines.rag.rerankers import RerankerConfig
from pipelines.sizing import Gpus
from pipelines.tune.data import ReaderConfig, load_reader
from pipelines.tune.proof import General
from pipelines.tune.recipe import Recipe, load_recipe
from serving.settings import ServeConfig

KINDS: dict[str, Any] = {
    "models": catalogue.Model,
    "recipes": Recipe,
    "proof": General,
    "data": ReaderConfig,
    "rag": RagConfig,
    "embedders": EmbedderConfig,
    "rerankers": RerankerConfig,
    "serve": ServeConfig,
    "gpus": Gpus,
}
DEPLOYED = CONFIGS / "deploy"  # Kubernetes' own schemas: tests/test_deploy.py
FILES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if DEPLOYED not in path.parents]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_file_fits_its_schema(path: Path) -> None:
    kind = KINDS[path.parent.name]
    assert isinstance(load(path, kind), kind)


def test_the_count_of_files_is_known() -> None:
    counts = {folder: len(names(folder)) for folder in KINDS}
    assert counts == {
        "models": 43,
        "recipes": 7,
        "proof": 1,
        "data": 1,
        "rag": 1,
        "embedders": 7,
        "rerankers": 2,
        "serve": 1,
        "gpus": 1,
    }
    assert sum(counts.values()) == len(FILES)


def test_all_problems_of_a_file_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("method: lora\ndata: 3\nlora: {rank: zero, alpha: 32, dropout: 0.0, colour: red}\nunheard: of\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Recipe)
    message = str(caught.value)
    for part in (
        "data:",
        "lora.rank:",
        "lora.colour: unknown key",
        "unheard: unknown key",
        "optimiser: missing",
        "schedule: missing",
    ):
        assert part in message
    assert "7 problems" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "holds list"), ("", "holds NoneType"), (b"\xff\xfe\x00a", "not a UTF-8")],
)
def test_a_broken_file_is_explained(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=expected):
        load(path, Recipe)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml", Recipe)


def test_overrides_are_typed_and_checked() -> None:
    recipe = load_recipe("lora", ["schedule.steps=3", "lora.dropout=0.5"])
    assert (recipe.schedule.steps, recipe.lora.dropout) == (3, 0.5)
    assert load_recipe("lora").schedule.steps != 3
    assert load_recipe("lora", ["optimiser.learning_rate=5e-05"]).optimiser.learning_rate == 5e-5
    for wrong in (
        "schedule.seed=2024-13-45",
        "lora.alpha=.inf",
        "schedule.steps=many",
        "schedule.steps",
        "schedule.pace=3",
        "schedule.steps.more=3",
        "schedule.steps=[1",
    ):
        with pytest.raises(ConfigError):
            load_recipe("lora", [wrong])


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("lora").method = "qlora"  # type: ignore[misc]


def test_an_unknown_name_gets_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        catalogue.find("mistral-7")
    assert "did you mean mistral-7b?" in str(caught.value)
    assert "falcon-40b" in str(caught.value)


@pytest.mark.parametrize("name", ["../recipes/lora", "lora.yaml", "", "/etc/passwd", "lora\0"])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(UnknownName):
        named("recipes", name)


def test_the_test_models_are_in_the_catalogue() -> None:
    assert len(load_reader().test_models) == 7
