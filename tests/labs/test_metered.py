"""The figures of a training while it runs: a real one in another process, scraped and compared with what its run keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from labs.metered import PORT, Metered, port_of
from pipelines import catalogue
from pipelines.config import ROOT
from pipelines.errors import ConfigError
from pipelines.tune import data, rehearsal
from pipelines.tune.training import Step
from tests.conftest import MODEL, Quiet

LABELS = {"model": MODEL, "recipe": "lora", "rehearsal": "no"}
STEPS = 500
# series -> field of metrics.jsonl
SAME = {
    "llmlab_training_loss": "loss", "llmlab_training_learning_rate": "learning_rate",
    "llmlab_training_gradient_norm": "gradient_norm", "llmlab_training_tokens_per_second": "tokens_per_second",
    "llmlab_training_step_duration_seconds": "seconds", "llmlab_training_steps_done": "step",
    "llmlab_training_steps_planned": "steps", "llmlab_training_eta_seconds": "eta_seconds",
    "llmlab_training_peak_memory_bytes": "peak_memory_bytes",
}  # fmt: skip
Scrape = dict[str, float]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shrunk model where the lab looks for weights that a user placed, and a file of rows."""
    folder = tmp_path_factory.mktemp("metered")
    texts = [path.read_text(encoding="utf-8") for path in sorted(data.KNOWLEDGE.glob("*.md"))]
    rehearsal.build(catalogue.runnable(MODEL), texts, folder / "models" / MODEL)
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def train(place: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(port: int | str, steps: int = STEPS) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "labs", "finetune", MODEL, "--recipe", "lora", "--data", str(place / "rows.jsonl"),
                   "--pull", "never", "--metrics-port", str(port), "--set", f"schedule.steps={steps}"]  # fmt: skip
        own = {"LLMLAB_MODELS": str(place / "models"), "LLMLAB_RUNS": str(tmp_path / "runs"), "PYTHONUNBUFFERED": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rows_in(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"finetune/{MODEL}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def address(process: subprocess.Popen[str]) -> str:
    """Read the output up to the line that names the address; the rest is read later."""
    assert process.stdout
    read = ""
    for line in process.stdout:
        read += line
        if found := re.search(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", line):
            return found[1]
    raise AssertionError(read)


def scrape(url: str) -> Scrape:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
        text = response.read().decode()
    families = text_string_to_metric_families(text)
    samples = [s for family in families for s in family.samples if s.name.startswith("llmlab_training_")]
    assert all(s.labels == LABELS for s in samples)
    return {s.name: s.value for s in samples}


def scrapes_until(url: str, enough: Callable[[list[Scrape]], bool]) -> list[Scrape]:
    found: list[Scrape] = []
    deadline = time.monotonic() + 120
    while not enough(found):
        assert time.monotonic() < deadline, found[-1:]
        if (now := scrape(url)) and now not in found:
            found.append(now)
        time.sleep(0.01)
    return found


def test_what_is_scraped_while_it_trains_is_what_the_run_keeps(
    train: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = train(0)
    url = address(process)
    found = scrapes_until(url, lambda seen: len(seen) >= 5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    with pytest.raises(OSError, match="refused"):
        scrape(url)
    rows, now = rows_in(tmp_path / "runs"), time.time()
    for seen in found:
        row = rows[int(seen["llmlab_training_steps_done"]) - 1]
        assert {series: seen[series] for series in SAME} == {series: row[field] for series, field in SAME.items()}
        assert seen["llmlab_training_rows_total"] == sum(r["rows"] for r in rows[: row["step"]])
        assert seen["llmlab_training_first_loss"] == rows[0]["loss"]
        assert 0 <= now - seen["llmlab_training_last_step_timestamp_seconds"] < 120


def step(number: int, loss: float) -> Step:
    return Step(number, 4, loss, 1.5, 0.001, 8, 300, 40, 0.5, 600.0, 2.0 - 0.5 * number, 123_000_000)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def told(quiet: Quiet) -> str:
    return next(line.removeprefix("metrics: ") for line in quiet.lines if line.startswith("metrics: http"))


def test_a_port_in_use_is_named_and_a_free_one_taken(taken: int) -> None:
    quiet = Quiet()
    with Metered(quiet, taken) as watcher:
        watcher.begin(MODEL, "lora", rehearsal=False)
        watcher.step(step(1, 3.0))
        assert scrape(told(quiet))["llmlab_training_loss"] == 3.0
    assert f"port {taken} of 127.0.0.1 cannot be had (Address already in use)" in quiet.lines[0]
    assert quiet.begun == [(MODEL, "lora", False)] and [s.loss for s in quiet.steps] == [3.0]


def test_a_training_goes_on_without_any_port() -> None:
    import resource

    quiet = Quiet()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest, 3), hard))  # no socket can be opened any more
    try:
        with Metered(quiet, 0) as watcher:
            watcher.begin(MODEL, "lora", rehearsal=False)
            watcher.step(step(1, 3.0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(quiet.steps) == 1 and [line for line in quiet.lines if "Too many open files" in line] == quiet.lines


def test_a_second_training_keeps_the_port_and_forgets_the_first() -> None:
    quiet = Quiet()
    with Metered(quiet, 0) as watcher:
        watcher.begin(MODEL, "dpo", rehearsal=True)
        watcher.step(step(1, 3.0))
        url = told(quiet)
        watcher.begin(MODEL, "lora", rehearsal=False)
        assert scrape(url) == {}
        watcher.step(step(2, 0.75))
        watcher.step(step(3, 0.5))
        now = scrape(url)
    assert (now["llmlab_training_first_loss"], now["llmlab_training_loss"]) == (0.75, 0.5)
    assert now["llmlab_training_rows_total"] == 16
    assert not [t for t in threading.enumerate() if t.name == "metrics"]
    with pytest.raises(OSError, match="refused"):
        scrape(url)


def test_every_figure_of_a_step_is_served_or_follows_from_others() -> None:
    left_out = {"rows", "tokens", "supervised_tokens"}  # rows are counted; tokens are speed times duration
    assert set(SAME.values()) | left_out == {field.name for field in fields(Step)}


def test_what_a_port_can_be() -> None:
    assert (port_of("auto"), port_of("none"), port_of("0"), port_of("9000")) == (PORT, None, 0, 9000)
    quiet = Quiet()
    with Metered(quiet, None) as watcher:
        watcher.begin(MODEL, "lora", rehearsal=False)
        watcher.step(step(1, 3.0))
    assert quiet.lines == [] and len(quiet.steps) == 1
    for wrong in ("65536", "-1", "http", "", "²"):
        with pytest.raises(ConfigError, match="--metrics-port"):
            port_of(wrong)
