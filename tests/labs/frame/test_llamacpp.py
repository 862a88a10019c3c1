"""Processor time of an engine, when the system's clock of it is coarser than what one request takes."""

from __future__ import annotations

from typing import Any

import pytest

from labs.frame import llamacpp
from pipelines.errors import EngineError

REQUEST_SECONDS = 0.004


class Clock:
    """Counts what an engine spends, in whole steps, as the kernel does for the times of another process."""

    def __init__(self, step: float) -> None:
        self.step, self.spent = step, 0.0

    def cpu_seconds(self) -> float:
        return self.spent // self.step * self.step


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> llamacpp.Engine:
    clock: Any = Clock(request.param)
    made = llamacpp.Engine("http://127.0.0.1:1", clock)

    def ask(*_: object) -> llamacpp.Speed:
        clock.spent += REQUEST_SECONDS
        return llamacpp.Speed(1.0, 1.0)

    monkeypatch.setattr(llamacpp.Engine, "ask", ask)
    return made


@pytest.mark.parametrize("engine", [0.01], indirect=True)
def test_requests_shorter_than_a_step_of_the_clock_are_measured(engine: llamacpp.Engine) -> None:
    assert engine.cpu_seconds_per_token([[1, 2]], 16) == pytest.approx(REQUEST_SECONDS / 16, rel=0.03)
    assert engine.cpu_seconds_per_token([[1, 2]] * 8, 16) == pytest.approx(REQUEST_SECONDS / 16, rel=0.03)


@pytest.mark.parametrize("engine", [1e9], indirect=True)
def test_a_clock_that_stands_still_ends_the_measurement(engine: llamacpp.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "STILL_SECONDS", 0.05)
    with pytest.raises(EngineError, match="without any processor time"):
        engine.cpu_seconds_per_token([[1, 2]], 16)
