"""The supervisor with an engine that misbehaves: start, failure, restart, stop. The real engines: test_contract."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from monitoring import metrics
from pipelines.errors import EngineError
from serving.address import check_free
from serving.engines.contract import Launch
from serving.settings import Restart
from serving.supervisor import Supervisor
from tests.serving.conftest import FakeEngine, descendants, gone, wait_until

Start = Callable[..., Supervisor]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Start]:
    made: list[Supervisor] = []

    def start(behaviour: str, startup_seconds: float = 20.0) -> Supervisor:
        port = check_free("127.0.0.1", 0, "")
        launch = Launch("fake", Path("fake.gguf"), (), "127.0.0.1", port, 512, 1, 1, False, tmp_path / "work")
        restart = Restart(first_delay_seconds=0.1, max_delay_seconds=0.2, settled_seconds=60.0, open_after_failures=3,
                          open_seconds=2.0)  # fmt: skip
        made.append(Supervisor(FakeEngine(behaviour), launch, startup_seconds, restart))
        made[-1].spawn()
        return made[-1]

    yield start
    for supervisor in made:
        supervisor.stop()


def test_an_engine_that_dies_while_it_starts_shows_its_last_words(supervise: Start) -> None:
    with pytest.raises(EngineError, match="cannot open the model"):
        supervise("dies").await_health()


def test_a_cause_that_is_known_is_told_with_its_remedy(supervise: Start) -> None:
    with pytest.raises(EngineError, match=r"(?s)leave no GPU memory for the KV cache.*engine\.log.*--set gpu_memory_share=0\.95"):
        supervise("full").await_health()


def test_an_engine_that_never_answers_is_given_up(supervise: Start) -> None:
    supervisor = supervise("mute", startup_seconds=0.5)
    processes = wait_until(lambda: descendants(supervisor._process.pid))
    with pytest.raises(EngineError, match="did not answer within 0.5 s"):
        supervisor.await_health()
    supervisor.stop()
    assert gone(processes)


def test_a_dead_engine_is_started_again(supervise: Start) -> None:
    supervisor = supervise("well")
    supervisor.await_health()
    supervisor.watch()
    for _ in range(2):
        (engine,) = descendants(supervisor._process.pid)
        engine.send_signal(signal.SIGKILL)
        wait_until(lambda: not supervisor.status.up)
        assert "SIGKILL" in supervisor.status.reason and supervisor.status.retry_after_seconds >= 1
        wait_until(lambda: supervisor.status.up)
    assert httpx.get(supervisor.launch.url + "/health", trust_env=False).status_code == 200


def test_an_engine_that_cannot_be_started_again_is_tried_on_and_stop_still_works(supervise: Start) -> None:
    supervisor = supervise("well")
    supervisor.await_health()
    supervisor.watch()
    supervisor.engine.behaviour = "dies"
    descendants(supervisor._process.pid)[0].kill()
    wait_until(lambda: "could not be started again" in supervisor.status.reason)
    supervisor.stop()
    assert not supervisor.status.up


def test_after_failures_in_a_row_the_circuit_opens_and_one_try_closes_it(supervise: Start) -> None:
    supervisor = supervise("well")
    supervisor.await_health()
    supervisor.watch()
    supervisor.engine.behaviour = "dies"
    descendants(supervisor._process.pid)[0].kill()
    wait_until(lambda: "failed 3 times in a row" in supervisor.status.reason)
    opened = time.monotonic()
    assert metrics.REGISTRY.get_sample_value("llmlab_engine_circuit_open", {"engine": "llamacpp"}) == 1
    said = supervisor.status.retry_after_seconds
    assert 2 <= said <= 2 + 2 * math.ceil(supervisor._start_seconds), "the pause and a start"
    supervisor.engine.behaviour = "well"
    wait_until(lambda: supervisor.status.up)
    assert 1.5 < time.monotonic() - opened < said + 3
    assert metrics.REGISTRY.get_sample_value("llmlab_engine_circuit_open", {"engine": "llamacpp"}) == 0


def test_stop_is_quick_where_it_can_be_and_safe_twice(supervise: Start) -> None:
    supervisor = supervise("well")
    supervisor.await_health()
    processes = descendants(supervisor._process.pid)
    supervisor.stop()
    supervisor.stop()
    assert gone(processes)
