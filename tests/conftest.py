"""What tests share: folders of their own for runs and indexes, and one real adapter, tuned for a few steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pipelines.hardware import OPENMP_ENVIRONMENT

os.environ |= OPENMP_ENVIRONMENT  # before torch is imported: engines run beside the tests

from pipelines.plan import Plan
from pipelines.runs import Run
from pipelines.tune.training import Step

MODEL = "smollm2-135m"

# A job that a shell starts in the background ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


FIGURES: list[str] = []


@pytest.fixture
def report_figure() -> Callable[[str], None]:
    """Take a measured figure, which is shown after the tests."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for figure in FIGURES:
        terminalreporter.write_line(figure)


class Quiet:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.plans: list[Plan] = []
        self.begun: list[tuple[str, str, bool]] = []
        self.steps: list[Step] = []
        self.cards: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def begin(self, model: str, recipe: str, *, rehearsal: bool) -> None:
        self.begun.append((model, recipe, rehearsal))

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def outcome(self, planned: dict[str, Any]) -> None:
        self.outcomes.append(planned)

    def proof(self, card: dict[str, Any]) -> None:
        self.cards.append(card)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs and indexes of the tests never mix with the user's; converted weights are shared, they cannot differ."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_RUNS", str(root / "runs"))
        patch.setenv("LLMLAB_INDEX", str(root / "index"))
        yield root


@pytest.fixture(scope="session")
def tuned_run() -> Run:
    """SmolLM2-135M tuned through the real job, for as few steps as change its answers."""
    from pipelines.tune.finetune import Job, finetune

    return finetune(Job(MODEL, "lora-quick", ("schedule.steps=14", "optimiser.learning_rate=0.002"), pull=False), Quiet())


@pytest.fixture(scope="session")
def rehearsed_run() -> Run:
    """Mistral 7B rehearsed: two layers, random weights, NF4."""
    from pipelines.tune.finetune import Job, finetune

    return finetune(Job("mistral-7b", rehearse=True, pull=False), Quiet())
