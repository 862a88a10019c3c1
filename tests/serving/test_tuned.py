"""Which runs are served and under which names; what is refused before anything starts: tests/serving/test_launch.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines import catalogue
from pipelines.errors import ConfigError, UnknownName
from pipelines.runs import Run
from serving.tuned import choose
from tests.serving.conftest import MODEL, TUNED, environment


def served(root: Path, *wanted: str) -> dict[str, str]:
    with environment(LLMLAB_RUNS=str(root)):
        return {adapter.name: adapter.run.id for adapter in choose(catalogue.find(MODEL), wanted).adapters}


@pytest.fixture
def both(tuned_run: Run, other_run: Run, tmp_path: Path) -> tuple[Path, str, str]:
    for run in (tuned_run, other_run):
        shutil.copytree(run.path, tmp_path / "finetune" / MODEL / run.id)
    older, newer = sorted((tuned_run.id, other_run.id))
    return tmp_path, older, newer


def test_the_newest_run_keeps_its_name_and_comes_first(both: tuple[Path, str, str]) -> None:
    root, older, newer = both
    named_by_run = f"{MODEL}-{older[-8:]}"
    for wanted in ((older, newer), (newer, older), ("latest", older)):
        assert list(served(root, *wanted).items()) == [(TUNED, newer), (named_by_run, older)]
    assert served(root, older) == {TUNED: older}
    assert served(root, f"faq={newer}", older) == {TUNED: older, "faq": newer}
    assert served(root, "faq=latest") == {"faq": newer}
    assert served(root, "none") == {}


@pytest.mark.parametrize("name", ["../x", "a/b", "a b", ".hidden", "-x", "", "x" * 81, MODEL])
def test_a_name_that_is_none_is_refused(both: tuple[Path, str, str], name: str) -> None:
    root, older, _ = both
    with pytest.raises(ConfigError):
        served(root, f"{name}={older}")


@pytest.mark.parametrize("run", ["", "../../etc", "/etc/passwd", "*", "x" * 41])
def test_a_run_that_is_none_is_refused(both: tuple[Path, str, str], run: str) -> None:
    with pytest.raises(UnknownName, match="no run is named"):
        served(both[0], run)


def test_a_name_is_given_once(both: tuple[Path, str, str]) -> None:
    root, older, newer = both
    with pytest.raises(ConfigError, match="'faq' would name two models"):
        served(root, f"faq={older}", f"faq={newer}")
    with pytest.raises(ConfigError, match=f"'{TUNED}' would name two models"):
        served(root, f"{TUNED}={older}", newer)
