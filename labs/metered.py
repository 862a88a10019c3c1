"""A training that can be watched from outside: the figures of each step for Prometheus, beside what the screen shows.

It is fed from the same records that a run keeps in metrics.jsonl, and it never stops a training: a port that cannot be had
is named and replaced by a free one.

    make finetune METRICS_PORT=8090
    curl -s http://127.0.0.1:8090/metrics
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from monitoring import hardware, metrics
from monitoring.exporter import HOST, Exporter
from pipelines.errors import ConfigError
from pipelines.plan import Plan
from pipelines.runs import runs_root
from pipelines.tune.finetune import Watcher
from pipelines.tune.training import Step

PORT = 8090  # monitoring/prometheus/prometheus.yml scrapes it
AUTO, NONE = "auto", "none"


def port_of(given: str) -> int | None:
    """Return the port that was asked for: `PORT` for "auto", None for "none", 0 for any free one.

    Raises:
        ConfigError: neither of the words, nor a port.
    """
    if given in (AUTO, NONE):
        return PORT if given == AUTO else None
    if not (given.isascii() and given.isdecimal() and int(given) <= 65535):
        raise ConfigError(f"--metrics-port {given}", f"a port from 0 to 65535, {AUTO} or {NONE}", f"--metrics-port {PORT}")
    return int(given)


class Metered:
    """Hands everything on to another watcher, and serves the figures of the newest step while the job runs.

    Args:
        watcher: who else follows the job.
        port: where the figures are served; None serves nothing, 0 takes a free port.
    """

    def __init__(self, watcher: Watcher, port: int | None) -> None:
        self._watcher, self._port = watcher, port
        self._exporter: Exporter | None = None
        self._labels: dict[str, str] = {}
        self._first = True

    def __enter__(self) -> Metered:
        """Serve nothing yet: a job that is refused needs no port."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the port back."""
        exporter, self._exporter = self._exporter, None
        if exporter:
            exporter.close()

    def say(self, text: str) -> None:
        """Hand the line on."""
        self._watcher.say(text)

    def plan(self, plan: Plan) -> None:
        """Hand the plan on."""
        self._watcher.plan(plan)

    def begin(self, model: str, recipe: str, *, rehearsal: bool) -> None:
        """Start to serve; a job of two trainings keeps its port."""
        self._watcher.begin(model, recipe, rehearsal=rehearsal)
        self._labels = {"model": model, "recipe": recipe, "rehearsal": "yes" if rehearsal else "no"}
        self._first = True
        if self._exporter:
            with self._exporter.lock:
                metrics.start_training()
            return
        metrics.start_training()
        hardware.watch(metrics.TRAINING, {"runs": runs_root()})
        self._exporter = self._open()
        if self._exporter:
            self.say(f"metrics: {self._exporter.url}")

    def step(self, step: Step) -> None:
        """Show the figures of a step to Prometheus, all at once, and hand them on."""
        if self._exporter:
            with self._exporter.lock:
                self._set(step)
        self._watcher.step(step)

    def proof(self, card: dict[str, Any]) -> None:
        """Hand the proof card on."""
        self._watcher.proof(card)

    def outcome(self, planned: dict[str, Any]) -> None:
        """Hand on what was planned and measured."""
        self._watcher.outcome(planned)

    def _open(self) -> Exporter | None:
        """Return a server on the port that was asked for, or on a free one; None if neither can be had or was asked for."""
        if self._port is None:
            return None
        for port in (self._port, 0):
            try:
                return Exporter(metrics.TRAINING, port)
            except OSError as error:
                self.say(f"metrics: port {port or '(any)'} of {HOST} cannot be had ({error.strerror or error})")
        return None

    def _set(self, step: Step) -> None:
        for metric, value in (
            (metrics.TRAINING_LOSS, step.loss), (metrics.TRAINING_LEARNING_RATE, step.learning_rate),
            (metrics.TRAINING_GRADIENT_NORM, step.gradient_norm), (metrics.TRAINING_TOKENS_PER_SECOND, step.tokens_per_second),
            (metrics.TRAINING_STEP_DURATION, step.seconds), (metrics.TRAINING_STEPS_DONE, step.step),
            (metrics.TRAINING_STEPS_PLANNED, step.steps), (metrics.TRAINING_ETA, step.eta_seconds),
            (metrics.TRAINING_PEAK_MEMORY, step.peak_memory_bytes), (metrics.TRAINING_LAST_STEP, time.time()),
        ):  # fmt: skip
            metric.labels(**self._labels).set(value)
        metrics.TRAINING_ROWS.labels(**self._labels).inc(step.rows)
        if self._first:
            metrics.TRAINING_FIRST_LOSS.labels(**self._labels).set(step.loss)
            self._first = False
