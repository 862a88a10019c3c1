"""What one gateway worker knows of the others, and what it is told by the process that starts it and keeps the engine.

The first line of a worker's standard input is its `Job`, each later one a `News`: whether the engine is up, which processes make
up the gateway, and the engine's figures. `serving.workers` writes them, `serving.worker` reads them; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipelines.config import Config
from serving.settings import ServeConfig
from serving.supervisor import Status, Supervisor


class Job(Config):
    """What a worker is to serve.

    Attributes:
        model: as the user named it.
        engine: the one that was chosen.
        engine_port: where it listens.
        adapters: each NAME=RUN; or the id of an export run, or "none".
        config: of the whole gateway, with no size left open; a worker takes its share of it.
        number: of the worker, from 0.
        socket: the descriptor that all workers accept from.
    """

    model: str
    engine: str
    engine_port: int
    adapters: list[str]
    config: ServeConfig
    number: int = 0
    socket: int = -1

    @property
    def share(self) -> ServeConfig:
        """Return the configuration of this one worker; the slots are those of the engine, whoever uses them."""
        config, workers = self.config, self.config.workers
        admission = config.admission.share(getattr(config.slots, self.engine), workers, self.number)
        connections = config.connections.share(workers, self.number)
        return config.model_copy(update={"admission": admission, "connections": connections})


class News(Config):
    """What changes while a worker serves.

    Attributes:
        up: whether the engine answers; if not, `reason` says why, and `expected_at` when it may (`time.monotonic`).
        pids: of the processes that make up the gateway.
        spent_seconds: CPU time of workers that have died.
        engine: the engine's figures, as `monitoring.workers.engine_exposition` gives them.
    """

    up: bool
    reason: str
    expected_at: float
    pids: tuple[int, ...]
    spent_seconds: float
    engine: str


class Crew:
    """The workers that this process is one of.

    Args:
        size: how many there are.
        folder: where all keep their metrics.
        news: the newest.
        supervisor: of the engine, which another process keeps; it is told here whether the engine is up.
    """

    def __init__(self, size: int, folder: Path, news: News, supervisor: Supervisor) -> None:
        self.size, self.folder, self._supervisor = size, folder, supervisor
        self._take(news)

    def listen(self, lines: Iterable[str]) -> None:
        """Take what comes, until the process that starts the workers is gone."""
        for line in lines:
            self._take(News.model_validate_json(line))

    def exposition(self) -> bytes:
        """Return the metrics of the whole gateway, as text."""
        from monitoring.workers import exposition

        return exposition(self.folder, self._news.pids, self._news.spent_seconds, self._news.engine)

    def _take(self, news: News) -> None:
        self._news = news
        self._supervisor.status = Status(news.up, news.reason, news.expected_at)
