"""The metrics of a gateway of several worker processes, added up; any of them answers a scrape with the same figures.

In prometheus_client's multiprocess mode each worker keeps its values in files of one folder. This reads the files, and does what
that mode leaves out:

- Counters and histograms are summed over all workers that there have been; what a dead one counted stays.
- Gauges of what is under way (`multiprocess_mode="livesum"` in monitoring.metrics) are summed over those that live.
- Every other gauge says the same in each worker, so it is taken from the one that answers; the files would keep label sets that
  were cleared long ago.
- The process figures, which that mode has not at all, are read for each process.
- The engine's figures belong to the process that keeps the engine, which hands them to the workers as text.

It starts no process (`serving.workers` does), and a gateway of one process does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from monitoring.metrics import ENGINE_METRICS, REGISTRY, series_name

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # read when prometheus_client is imported, so it is set for a process before it starts
ADDED = ("counter_*.db", "histogram_*.db", "gauge_livesum_*.db")
LARGEST, SMALLEST = "process_open_fds", ("process_max_fds", "process_start_time_seconds")  # the others are summed


class Gathered(Collector):
    """What all workers count together.

    Args:
        folder: of their files.
        pids: of the processes that make up the gateway.
        spent_seconds: CPU time of those that are gone, so that the sum never falls.
    """

    def __init__(self, folder: Path, pids: Sequence[int], spent_seconds: float) -> None:
        self.folder, self.pids, self.spent_seconds = folder, tuple(pids), spent_seconds

    def collect(self) -> Iterable[Metric]:
        """Read the files, this process's own gauges, and each process."""
        files = [str(path) for pattern in ADDED for path in self.folder.glob(pattern)]
        added: dict[str, Metric] = {family.name: family for family in _merge(files)}
        known = [f for f in REGISTRY.collect() if f.type == "gauge" and f.name not in added and not f.name.startswith("process_")]
        return [*added.values(), *(family for family in known if family.samples), *_of_processes(self.pids, self.spent_seconds)]


def exposition(folder: Path, pids: Sequence[int], spent_seconds: float, engine: str) -> bytes:
    """Return the metrics of the whole gateway as text; `engine` is what `engine_exposition` says where the engine is kept."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Gathered(folder, pids, spent_seconds))
    return generate_latest(registry) + engine.encode()


def engine_exposition() -> str:
    """Return the engine's figures of this process as text."""
    return generate_latest(REGISTRY.restricted_registry([series_name(metric) for metric in ENGINE_METRICS])).decode()


def forget_gauges(folder: Path, pid: int) -> None:
    """Leave out what a worker had under way when it died; what it counted stays."""
    mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _merge(files: list[str]) -> Iterable[Metric]:
    found: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return found


def _of_processes(pids: Sequence[int], spent_seconds: float) -> list[Metric]:
    """Return the process figures: memory and CPU time in all, files of the process that has most of them open."""
    read = [{family.name: family for family in ProcessCollector(pid=_fixed(pid), registry=None).collect()} for pid in pids]
    names = dict.fromkeys(name for families in read for name in families)
    return [_together([families[name] for families in read if name in families], spent_seconds) for name in names]


def _together(families: list[Metric], spent_seconds: float) -> Metric:
    name, values = families[0].name, [family.samples[0].value for family in families]
    if name in SMALLEST:
        value = min(values)
    else:
        value = max(values) if name == LARGEST else sum(values) + (spent_seconds if name == "process_cpu_seconds" else 0.0)
    whole = Metric(name, families[0].documentation, families[0].type)
    whole.add_sample(families[0].samples[0].name, {}, value)
    return whole


def _fixed(pid: int) -> Callable[[], int]:
    return lambda: pid
