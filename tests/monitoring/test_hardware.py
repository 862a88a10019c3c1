"""The machine: what is read of it is true; GPUs are absent without one, and with NVML's answers they have its units."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry

from monitoring import hardware, metrics


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[CollectorRegistry]:
    fresh = CollectorRegistry()
    hardware.watch(fresh, {"runs": tmp_path / "not" / "there" / "yet"})
    yield fresh
    hardware._WATCHED.pop(fresh)
    for gauge in (metrics.GPU_BUSY, metrics.GPU_MEMORY, metrics.GPU_MEMORY_USED, metrics.GPU_POWER, metrics.GPU_TEMPERATURE):
        gauge.clear()
    metrics.DISK_FREE.clear()
    metrics.DISK_SIZE.clear()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    (found,) = [s.value for f in registry.collect() for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return found


def test_the_machine_is_read_at_each_scrape(registry: CollectorRegistry, tmp_path: Path) -> None:
    assert value(registry, "llmlab_machine_memory_bytes") == psutil.virtual_memory().total
    assert 0 < value(registry, "llmlab_machine_memory_available_bytes") < psutil.virtual_memory().total
    assert value(registry, "llmlab_machine_cpus") >= 1 and value(registry, "llmlab_machine_load") >= 0
    usage = psutil.disk_usage(str(tmp_path))
    assert value(registry, "llmlab_disk_size_bytes", folder="runs") == usage.total
    assert value(registry, "llmlab_disk_free_bytes", folder="runs") == pytest.approx(usage.free, rel=0.2)


def test_a_second_call_replaces_the_folders(registry: CollectorRegistry, tmp_path: Path) -> None:
    hardware.watch(registry, {"index": tmp_path})
    names = [sample.name for family in registry.collect() for sample in family.samples]
    assert names.count("llmlab_machine_load") == 1
    assert value(registry, "llmlab_disk_free_bytes", folder="index") > 0


def test_without_a_gpu_there_are_no_series_of_one(registry: CollectorRegistry) -> None:
    if hardware._cards():
        pytest.skip("this machine has a GPU")
    assert not [s for family in registry.collect() for s in family.samples if s.name.startswith("llmlab_gpu_")]


class Refuses(Exception):
    """Stands for pynvml.NVMLError."""


def nvml(**answers: Any) -> ModuleType:
    """Return what stands for NVML with one card that cannot tell its power, as some cannot."""

    def no_power(_: object) -> int:
        raise Refuses

    module = ModuleType("pynvml")
    memory, rates = SimpleNamespace(total=80 * 2**30, used=20 * 2**30), SimpleNamespace(gpu=37)
    known = {"NVMLError": Refuses, "NVML_TEMPERATURE_GPU": 0, "nvmlDeviceGetMemoryInfo": lambda _: memory,
             "nvmlDeviceGetUtilizationRates": lambda _: rates, "nvmlDeviceGetTemperature": lambda _, __: 61,
             "nvmlDeviceGetPowerUsage": no_power}  # fmt: skip
    module.__dict__.update(known | answers)
    return module


@pytest.mark.parametrize(("power", "watts"), [(None, []), (lambda _: 312_500, [312.5])])
def test_a_gpu_is_shown_in_base_units(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, power: Any, watts: list[float]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**({"nvmlDeviceGetPowerUsage": power} if power else {})))
    monkeypatch.setattr(hardware, "_cards", lambda: ("card",))
    assert value(registry, "llmlab_gpu_busy_ratio", gpu="0") == 0.37
    assert value(registry, "llmlab_gpu_memory_used_bytes", gpu="0") / value(registry, "llmlab_gpu_memory_bytes", gpu="0") == 0.25
    assert value(registry, "llmlab_gpu_temperature_celsius", gpu="0") == 61
    shown = [s.value for family in registry.collect() for s in family.samples if s.name == "llmlab_gpu_power_watts"]
    assert shown == watts
