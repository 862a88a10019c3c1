"""Check this machine: what is here, what is missing, and the command that fixes it. `make doctor`"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

from pipelines import catalogue, hardware, weights

NEEDED_MEMORY_BYTES = 3_000_000_000
NEEDED_DISK_BYTES = 3_000_000_000


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `fix` is empty where nothing needs to be done.

    `required` findings that are not ok make the command fail; the others limit what can be done here.
    """

    what: str
    ok: bool
    found: str
    fix: str = ""
    required: bool = False

    @property
    def mark(self) -> str:
        """Return "ok", "MISSING" for what the lab cannot do without, or "-" for what limits it."""
        return "ok" if self.ok else "MISSING" if self.required else "-"


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds, most of it for the hub's answer."""
    machine = hardware.probe()
    return [_python(), _torch(machine), _cpu(machine), _memory(machine), _disk(machine), _gpu(machine), *_engines(),
            _weights(), _prometheus(), _docker(), _hub()]  # fmt: skip


def _python() -> Finding:
    version = sys.version.split()[0]
    return Finding(
        "Python", sys.version_info[:2] == (3, 11), version, "install Python 3.11, then: make setup PYTHON=python3.11", True
    )


def _torch(machine: hardware.Machine) -> Finding:
    import torch

    cuda = torch.cuda.is_available()
    wasted = bool(machine.gpus) and not cuda
    found = f"{torch.__version__}, {'CUDA' if cuda else 'CPU'}, {torch.get_num_threads()} threads"
    return Finding("torch", not wasted, found, "the GPU is unused: install a CUDA build of torch" if wasted else "")


def _cpu(machine: hardware.Machine) -> Finding:
    fast = "avx2" in machine.cpu_features or "asimd" in machine.cpu_features
    native = any(f in machine.cpu_features for f in ("avx512_bf16", "amx_bf16"))
    found = f"{machine.cpus} cores, {' '.join(machine.cpu_features) or 'no vector extension known to us'}"
    return Finding(
        "CPU",
        fast,
        found + ("" if native else "; no bf16 units, so float32 is used"),
        "" if fast else "use another machine: this one is slow",
    )


def _memory(machine: hardware.Machine) -> Finding:
    found = f"{machine.free_memory_bytes / 1e9:.1f} GB free of {machine.memory_bytes / 1e9:.1f} GB"
    return Finding(
        "memory",
        machine.free_memory_bytes >= NEEDED_MEMORY_BYTES,
        found,
        "close programs: tuning SmolLM2-135M takes 2.5 GB",
        True,
    )


def _disk(machine: hardware.Machine) -> Finding:
    enough = machine.free_disk_bytes >= NEEDED_DISK_BYTES
    return Finding(
        "disk", enough, f"{machine.free_disk_bytes / 1e9:.1f} GB free", "free 3 GB, or move: LLMLAB_RUNS, LLMLAB_MODELS", True
    )


def _gpu(machine: hardware.Machine) -> Finding:
    if not machine.gpus:
        return Finding("GPU", True, "none; everything here runs on the CPU")
    return Finding("GPU", True, "; ".join(f"{g.name}, {g.memory_bytes / 1e9:.0f} GB, driver {g.driver}" for g in machine.gpus))


def _engines() -> list[Finding]:
    llamacpp = importlib.util.find_spec("xllamacpp") is not None
    vllm = hardware.vllm_is_installed()
    return [
        Finding("engine llamacpp", llamacpp, "installed" if llamacpp else "missing", "make setup", True),
        Finding("engine vllm", vllm, "installed" if vllm else "not installed (optional)", "make setup-vllm"),
    ]


def _weights() -> Finding:
    entry = catalogue.runnable("smollm2-135m")
    here = weights.packaged_gguf(entry) or weights.on_disk(entry)
    return Finding("weights of smollm2-135m", here is not None, "shipped in a package" if here else "missing", "make setup", True)


def _prometheus() -> Finding:
    from monitoring.child_server import ProgramMissing
    from monitoring.prometheus_server import find_prometheus

    try:
        return Finding("Prometheus", True, str(find_prometheus()))
    except ProgramMissing:
        return Finding(
            "Prometheus",
            False,
            "not found (make monitor needs it)",
            "apt-get install prometheus, or PROMETHEUS=/path/to/prometheus",
        )


def _docker() -> Finding:
    from labs.monitor import docker_is_missing

    problem = docker_is_missing()
    return Finding(
        "Docker (for Grafana)", not problem, problem or "with Compose", "install Docker with Compose and start it (optional)"
    )


def _hub() -> Finding:
    reachable, reason = weights.hub_is_reachable()
    fix = "nothing to do for smollm2-135m; other models need the hub, a mirror (HF_ENDPOINT) or their files in LLMLAB_MODELS/NAME"
    return Finding("model hub", reachable, f"{'reachable' if reachable else 'not reachable'} ({reason})", fix)
