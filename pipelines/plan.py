"""What a tuning job will need, told before anything is loaded: memory, disk and time against this machine.

The parameters are counted on the real architecture, built without memory on torch's meta device. The time is arithmetic
divided by a speed measured on the spot, so it is an order of magnitude, not a promise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.catalogue import Model
from pipelines.errors import PlanDoesNotFit
from pipelines.hardware import Machine
from pipelines.tune.recipe import Recipe

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a 4-bit code, an 8-bit scale for 64 of them, a float for 256 scales
ADAPTER_STATE_BYTES = 16  # float32 weight, gradient and two AdamW moments
RUNTIME_BYTES = 1_000_000_000  # interpreter, torch and the libraries
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Plan:
    """The needs of a job; every size in bytes."""

    model: str
    method: str
    device: str
    parameters: int
    quantised_parameters: int
    adapter_parameters: int
    weight_bytes: int
    adapter_bytes: int
    activation_bytes: int
    available_memory_bytes: int
    download_bytes: int
    free_disk_bytes: int
    seconds: float
    license_gate: str

    @property
    def memory_bytes(self) -> int:
        """Return the peak memory that is expected."""
        return RUNTIME_BYTES + self.weight_bytes + self.adapter_bytes + self.activation_bytes

    def check(self) -> None:
        """Raise `PlanDoesNotFit` with every resource that is short."""
        short = []
        if self.memory_bytes > self.available_memory_bytes:
            short.append(f"memory: needs {_gb(self.memory_bytes)}, {_gb(self.available_memory_bytes)} available on {self.device}")
        if self.download_bytes > self.free_disk_bytes:
            short.append(f"disk: needs {_gb(self.download_bytes)}, {_gb(self.free_disk_bytes)} free")
        if short:
            raise PlanDoesNotFit(
                f"{self.model} does not fit: " + "; ".join(short),
                "a machine with more",
                f"a shorter --set schedule.max_tokens, or llmlab finetune {self.model} --rehearse",
            )

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (what, value) for a table."""
        how = "NF4, double quantisation" if self.quantised_parameters else "not quantised"
        return [
            ("parameters", f"{self.parameters / 1e9:.3f} B"),
            ("weights", f"{_gb(self.weight_bytes)} ({how})"),
            ("adapter, gradients, AdamW", f"{_gb(self.adapter_bytes)} ({self.adapter_parameters / 1e6:.1f} M parameters)"),
            ("activations", f"{_gb(self.activation_bytes)} at most"),
            ("memory", f"{_gb(self.memory_bytes)} of {_gb(self.available_memory_bytes)} available on {self.device}"),
            ("disk", f"{_gb(self.download_bytes)} to fetch, {_gb(self.free_disk_bytes)} free"),
            ("time", f"about {_duration(self.seconds)} on this {self.device}"),
            ("licence gate", self.license_gate),
        ]


def make_plan(entry: Model, recipe: Recipe, machine: Machine, device: str, *, on_disk: bool) -> Plan:
    """Return the plan for tuning `entry`, a runnable model, with `recipe` on `device` ("cpu" or "cuda")."""
    assert entry.dimensions and entry.weights  # runnable
    total, linear, adapter = count_parameters(entry, recipe.lora.rank if recipe.lora else 16)
    quantised = linear if recipe.method == "qlora" else 0
    full = 2 if device == "cuda" else 4
    d, tokens = entry.dimensions, recipe.schedule.max_tokens
    per_token = d.layers * (8 * d.hidden + 4 * d.intermediate) + 3 * d.vocabulary * 0.2  # a fifth of the places has a label
    trained_tokens = (
        (recipe.schedule.steps or 100) * recipe.schedule.rows_per_step / recipe.schedule.rows_per_prompt * tokens * 0.5
    )
    return Plan(
        model=entry.name, method=recipe.method, device=device, parameters=total, quantised_parameters=quantised,
        adapter_parameters=adapter, weight_bytes=int(quantised * NF4_BITS / 8 + (total - quantised) * full),
        adapter_bytes=adapter * ADAPTER_STATE_BYTES, activation_bytes=int(per_token * tokens * full),
        available_memory_bytes=_free_gpu_memory() if device == "cuda" else machine.free_memory_bytes,
        download_bytes=0 if on_disk else entry.weights.download_bytes, free_disk_bytes=machine.free_disk_bytes,
        seconds=4 * total * trained_tokens / measured_flops(device), license_gate=entry.weights.license_gate,
    )  # fmt: skip


def _free_gpu_memory() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def count_parameters(entry: Model, rank: int) -> tuple[int, int, int]:
    """Return (all parameters, those in quantisable projections, those of the adapter) of the real architecture."""
    import torch
    import transformers

    from pipelines.tune.rehearsal import architecture_config

    assert entry.dimensions  # runnable
    with torch.device("meta"):
        model = getattr(transformers, entry.dimensions.architecture)(architecture_config(entry.dimensions))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}
    adapted = [m for n, m in linear.items() if n.rsplit(".", 1)[-1] in entry.target_modules]
    return (sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear.values()),
            sum(rank * (m.in_features + m.out_features) for m in adapted))  # fmt: skip


def measured_flops(device: str) -> float:
    """Return the floating-point operations per second of a matrix product, measured for a fraction of a second."""
    import torch

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.rand(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=kind)
    (a @ a).sum().item()
    began = time.perf_counter()
    for _ in range(5):
        (a @ a).sum().item()
    return 5 * 2 * MATMUL_SIZE**3 / (time.perf_counter() - began)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
