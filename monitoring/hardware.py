"""The machine below gateway and training: memory, load, disks and GPUs, read when Prometheus asks.

GPUs are read by NVML, the library of NVIDIA's driver; without one their series are absent, not zero. It decides nothing about
what is too little (the alerts do). Gateway and training both have these series, so that either alone shows the machine.

    curl -s http://127.0.0.1:8000/metrics | grep -E 'llmlab_(machine|disk|gpu)_'
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.registry import Collector

from monitoring import metrics as m

MILLIWATTS = 1000


class Machine(Collector):
    """Reads the machine at each scrape; one for each registry, see `watch`.

    Args:
        folders: what is kept where; a folder that does not exist yet counts as the nearest one above it.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self._reading = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        """Name nothing ahead: nothing is read before somebody asks."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Read everything and return it."""
        with self._reading:
            _read_machine()
            for name, folder in self.folders.items():
                _read_disk(name, folder)
            for number, card in enumerate(_cards()):
                _read_gpu(f"{number}", card)
            return list(m.HARDWARE.collect())


_WATCHED: dict[CollectorRegistry, Machine] = {}


def watch(registry: CollectorRegistry, folders: Mapping[str, Path]) -> None:
    """Have a registry show the machine too; a second call replaces the folders of the first."""
    if registry in _WATCHED:
        _WATCHED[registry].folders = dict(folders)
        return
    _WATCHED[registry] = Machine(folders)
    registry.register(_WATCHED[registry])


def _read_machine() -> None:
    import psutil

    memory = psutil.virtual_memory()
    m.MACHINE_MEMORY.set(memory.total)
    m.MACHINE_MEMORY_AVAILABLE.set(memory.available)
    m.MACHINE_CPUS.set(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    m.MACHINE_LOAD.set(psutil.getloadavg()[0])


def _read_disk(name: str, folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    m.DISK_SIZE.labels(folder=name).set(usage.total)
    m.DISK_FREE.labels(folder=name).set(usage.free)


@cache
def _cards() -> tuple[Any, ...]:
    """Return NVML's handles of the GPUs; none without the driver, which is looked for once."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # no package, no driver, or one that does not fit
        return ()


def _read_gpu(gpu: str, card: Any) -> None:
    """Show what this card can say; some cannot tell their power, and a card in parts not how busy it is."""
    import pynvml

    readings: tuple[tuple[Gauge, Callable[[], float]], ...] = (
        (m.GPU_MEMORY, lambda: pynvml.nvmlDeviceGetMemoryInfo(card).total),
        (m.GPU_MEMORY_USED, lambda: pynvml.nvmlDeviceGetMemoryInfo(card).used),
        (m.GPU_BUSY, lambda: pynvml.nvmlDeviceGetUtilizationRates(card).gpu / 100),
        (m.GPU_POWER, lambda: pynvml.nvmlDeviceGetPowerUsage(card) / MILLIWATTS),
        (m.GPU_TEMPERATURE, lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)),
    )
    for metric, value in readings:
        try:
            metric.labels(gpu=gpu).set(value())
        except pynvml.NVMLError:
            metric.remove(gpu)
