"""What a tuning job will need, told before anything is loaded: memory, disk and time against this machine.

The model is built on torch's meta device, which takes no memory, and one step is traced on it: every tensor that autograd
would keep for the backward pass is counted. With the weights at hand the step is the largest of the real data; otherwise it
is the largest that the recipe allows. The constants for a CPU were fitted to resident memory measured on this code; a slow
test compares plan and measurement for six combinations. The time is arithmetic divided by a speed measured on the spot, so
it is an order of magnitude, not a promise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import weights
from pipelines.architecture import Cache, cache_of, config_of, layers_of, on_meta
from pipelines.catalogue import Model
from pipelines.errors import PlanDoesNotFit
from pipelines.hardware import Machine
from pipelines.tune.packing import Packed
from pipelines.tune.recipe import Lora, Recipe

if TYPE_CHECKING:
    import torch

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a 4-bit code, an 8-bit scale for 64 of them, a float for 256 scales
RUNTIME_BYTES = 540_000_000  # interpreter, torch and the libraries, as resident memory
WORKSPACE_BYTES = 290_000_000  # what a CPU's kernels and the allocator hold once training has begun
ACTIVATION_FACTOR = 1.2  # of what autograd keeps: temporaries of the backward pass, and pages that are freed but not given back
LOGIT_COPIES = 3  # logits, their softmax and their gradient
LABEL_SHARE = 0.2  # of the places, where the data is not at hand
MATMUL_SHARE = 0.6  # of the time of a step on a CPU is matrix products at full speed
MATMUL_SIZE = 1024
SHRINKING = (("schedule.sequences_at_once=1", {"sequences_at_once": 1}), ("schedule.checkpointing=true", {"checkpointing": True}))


@dataclass(frozen=True)
class Batch:
    """What is computed at once: `sequences` of `tokens` places each, with `labels` in all of them together."""

    sequences: int
    tokens: int
    labels: int


@dataclass(frozen=True)
class Plan:
    """The needs of a job; every size in bytes."""

    model: str
    method: str
    device: str
    parameters: int
    quantised_parameters: int
    trained_parameters: int
    batch: Batch
    weight_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    activation_bytes: int
    fixed_bytes: int
    mapped_bytes: int
    processes: int
    cache: Cache
    available_memory_bytes: int
    download_bytes: int
    run_bytes: int
    free_disk_bytes: int
    seconds: float
    license_gate: str
    way_out: str

    @property
    def memory_bytes(self) -> int:
        """Return the peak memory of a process, which is in a step; a checkpoint is written from where the tensors are."""
        held = self.fixed_bytes + self.weight_bytes + self.adapter_bytes + self.optimiser_bytes
        return held + self.gradient_bytes + self.activation_bytes

    @property
    def resident_bytes(self) -> int:
        """Return what the system will count: also the file that NF4 was made from, whose pages stay while there is room."""
        room = self.available_memory_bytes - self.all_memory_bytes
        return self.memory_bytes + max(0, min(self.mapped_bytes, room // self.processes))

    @property
    def all_memory_bytes(self) -> int:
        """Return the peak memory on the device: on a CPU of all processes; of several GPUs each has one process."""
        return self.memory_bytes * (self.processes if self.device == "cpu" else 1)

    @property
    def fits_memory(self) -> bool:
        """Return True if there is as much memory as is expected to be used."""
        return self.all_memory_bytes <= self.available_memory_bytes

    @property
    def disk_bytes(self) -> int:
        """Return what is written: weights that have to be fetched, two checkpoints and the result."""
        return self.download_bytes + self.run_bytes

    def check(self) -> None:
        """Raise `PlanDoesNotFit` with every resource that is short."""
        short = []
        if not self.fits_memory:
            there = f"{_gb(self.available_memory_bytes)} available on {self.device}"
            short.append(f"memory: needs {_gb(self.all_memory_bytes)}, {there}")
        if self.disk_bytes > self.free_disk_bytes:
            short.append(f"disk: needs {_gb(self.disk_bytes)}, {_gb(self.free_disk_bytes)} free")
        if short:
            raise PlanDoesNotFit(f"{self.model} does not fit: " + "; ".join(short), "a machine with more", self.way_out)

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (what, value) for a table."""
        how = "NF4, double quantisation" if self.quantised_parameters else "not quantised"
        b = self.batch
        each = "" if self.processes == 1 else f" in {self.processes} processes" if self.device == "cpu" else " on each GPU"
        at_once = (f"{b.sequences} x " if b.sequences > 1 else "") + f"{b.tokens} tokens, {b.labels} labels"
        return [
            ("parameters", f"{self.parameters / 1e9:.3f} B, {self.trained_parameters / 1e6:.1f} M of them trained"),
            ("weights", f"{_gb(self.weight_bytes)} ({how})"),
            ("adapter", _gb(self.adapter_bytes)),
            ("gradients", _gb(self.gradient_bytes)),
            ("optimiser", f"{_gb(self.optimiser_bytes)} (AdamW)"),
            ("activations", f"{_gb(self.activation_bytes)} (largest step: {at_once})"),
            ("runtime", _gb(self.fixed_bytes)),
            ("memory", f"{_gb(self.all_memory_bytes)}{each} of {_gb(self.available_memory_bytes)} available on {self.device}"),
            ("KV cache, to serve", f"{self.cache.bytes(1000) / 1e6:.0f} MB for 1000 tokens"),
            ("disk", f"{_gb(self.download_bytes)} to fetch, {_gb(self.run_bytes)} to write, {_gb(self.free_disk_bytes)} free"),
            ("time", f"about {_duration(self.seconds)} on this {self.device}"),
            ("licence gate", self.license_gate),
        ]


def make_plan(entry: Model, recipe: Recipe, machine: Machine, device: str, *, on_disk: bool, quantised: bool,
              lora: Lora | None, processes: int = 1, steps: Sequence[Sequence[Packed]] | None = None) -> Plan:  # fmt: skip
    """Return the plan for tuning a model.

    Args:
        entry: a runnable model.
        recipe: how it is tuned.
        machine: what there is.
        device: "cpu" or "cuda".
        on_disk: nothing has to be fetched.
        quantised: the base is in NF4; for dpo as in the run that it goes on with.
        lora: the shape of the adapter, for dpo of the one that it goes on with; None if there is none or it is not known yet.
        processes: how many hold all of it, or of the frozen layers a share each, if the recipe says so.
        steps: what is learnt, if the tokenizer is at hand; None takes the most that the recipe allows.
    """
    assert entry.weights  # runnable
    s = recipe.schedule
    model = meta_model(entry, recipe, lora, experts=True)
    total, in_nf4, trained = count_parameters(model, quantised=quantised)
    batch = largest(steps, s.sequences_at_once) if steps else largest_of(recipe)
    size = 2 if device == "cuda" else 4
    spread = _spread(model, processes) if s.shard_weights and processes > 1 else 0
    base = total if recipe.method == "full" else total - trained
    own = 0 if recipe.method == "full" else trained
    tokens = sum(len(p.tokens) for step in steps for p in step) if steps else _expected_tokens(recipe)
    passes = 6 if recipe.method == "full" else 4
    speed = measured_flops(device) * (MATMUL_SHARE if device == "cpu" else 1)
    return Plan(
        model=entry.name, method=recipe.method, device=device, parameters=base, quantised_parameters=in_nf4,
        trained_parameters=trained, batch=batch, weight_bytes=int(in_nf4 * NF4_BITS / 8 + (base - in_nf4 - spread) * size),
        adapter_bytes=4 * own, gradient_bytes=4 * trained, optimiser_bytes=8 * trained,
        activation_bytes=step_bytes(model, entry, recipe, lora, batch, size),
        mapped_bytes=_file_bytes(entry) * in_nf4 // base if device == "cpu" else 0,
        fixed_bytes=RUNTIME_BYTES + WORKSPACE_BYTES if device == "cpu" else 0, processes=processes,
        cache=cache_of(config_of(entry)),
        available_memory_bytes=_free_gpu_memory() if device == "cuda" else machine.free_memory_bytes,
        download_bytes=0 if on_disk else entry.weights.size_bytes, run_bytes=(2 * 12 + 2 * 4) * trained,
        free_disk_bytes=machine.free_disk_bytes, seconds=passes * base * tokens / speed, license_gate=entry.weights.license_gate,
        way_out=_way_out(entry.name, recipe),
    )  # fmt: skip


def against(plan: Plan, peak_memory_bytes: int, seconds: float) -> dict[str, Any]:
    """Return what was planned for a process beside what was measured, for the run and for the screen."""
    return {
        "plan": [list(row) for row in plan.rows()],
        "memory_bytes": {"planned": plan.resident_bytes, "measured": peak_memory_bytes},
        "seconds": {"planned": round(plan.seconds, 1), "measured": seconds},
    }


def largest(steps: Sequence[Sequence[Packed]], at_once: int) -> Batch:
    """Return the batch of a training that takes most memory, padding included."""
    batches = [step[i : i + at_once] for step in steps for i in range(0, len(step), at_once)]
    found = [Batch(len(b), max(len(p.tokens) for p in b), sum(p.supervised for p in b)) for b in batches]
    return max(found, key=lambda b: b.sequences * b.tokens)


def largest_of(recipe: Recipe) -> Batch:
    """Return the batch that takes most memory among all that a recipe allows."""
    s = recipe.schedule
    return Batch(s.sequences_at_once, s.max_tokens, round(LABEL_SHARE * s.sequences_at_once * s.max_tokens))


def step_bytes(model: Any, entry: Model, recipe: Recipe, lora: Lora | None, batch: Batch, size: int) -> int:
    """Return what a step takes beyond weights, gradients and optimiser.

    PEFT makes a copy of experts that have an adapter, which stands until the backward pass has gone by.

    Args:
        model: as `meta_model` makes it, experts included.
        entry: a runnable model.
        recipe: how it is tuned.
        lora: shape of the adapter, if the recipe does not say it.
        batch: what is computed at once.
        size: bytes of an element.
    """
    adapted = entry.tuning.expert_parameters if entry.tuning and recipe.method != "full" else []
    traced = meta_model(entry, recipe, lora) if adapted else model
    copied: int = sum(p.numel() for name, p in traced.named_parameters() if any(name.endswith(f".{e}") for e in adapted))
    layers: int = len(layers_of(traced.get_base_model())) if copied and recipe.schedule.checkpointing else 1
    return activation_bytes(traced, batch, size) + copied * size // layers


def activation_bytes(model: Any, batch: Batch, size: int) -> int:
    """Return the memory of a forward and backward pass beyond weights and gradients.

    Args:
        model: on the meta device.
        batch: what goes through it.
        size: bytes of an element.
    """
    import torch

    from pipelines.tune.sft import label_loss

    places = torch.zeros(batch.sequences, batch.tokens, dtype=torch.long, device="meta")
    labels = torch.zeros(batch.labels, dtype=torch.long, device="meta")
    mask = torch.ones(batch.sequences, 1, batch.tokens, batch.tokens, dtype=torch.bool, device="meta")
    inputs = {"input_ids": places, "position_ids": places, "attention_mask": mask, "label_places": labels, "labels": labels}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = _Kept()

    def note(tensor: torch.Tensor) -> _Held | None:
        scores = tensor.shape[-2:] == (batch.tokens, batch.tokens) and tensor.is_floating_point()  # fused attention keeps none
        return None if scores or tensor.untyped_storage()._cdata in parameters else _Held(kept, tensor)

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda held: held):
        loss = label_loss(model, inputs)
    assert loss.is_meta
    output = model.get_output_embeddings().weight
    logits: int = LOGIT_COPIES * batch.labels * output.shape[0] * 4
    return int(ACTIVATION_FACTOR * kept.most * size / output.itemsize + logits)


class _Kept:
    """The storages that graphs hold, each counted once; `most` is the most bytes at a time."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.bytes = self.most = 0


class _Held:
    """A tensor in the hands of a graph, which lets go of it when the graph is dropped, as DoRA's norms are at once."""

    def __init__(self, kept: _Kept, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.key, self.size = kept, tensor, storage._cdata, storage.nbytes()
        before = kept.holders.get(self.key, 0)
        kept.holders[self.key] = before + 1
        kept.bytes += 0 if before else self.size
        kept.most = max(kept.most, kept.bytes)

    def __del__(self) -> None:
        """Let go."""
        self.kept.holders[self.key] -= 1
        if not self.kept.holders[self.key]:
            self.kept.bytes -= self.size


def meta_model(entry: Model, recipe: Recipe, lora: Lora | None = None, *, experts: bool = False) -> Any:
    """Return the real architecture with the recipe's adapter, on the meta device.

    Args:
        entry: a runnable model.
        recipe: how it is tuned.
        lora: shape of the adapter, if the recipe does not say it.
        experts: those that get an adapter have it; then parameters can be counted, but no step can be traced.
    """
    import torch

    from pipelines.tune import adapter

    assert entry.tuning  # runnable
    shape = lora or recipe.lora or (Lora(rank=16, alpha=32, dropout=0.0) if recipe.method == "dpo" else None)
    checkpointing = recipe.schedule.checkpointing
    with torch.device("meta"):
        model = on_meta(config_of(entry))
        if shape is None:
            return adapter.ready(model, quantised=False, checkpointing=checkpointing)
        return adapter.attach(model, shape, entry.tuning.target_modules, quantised=False, dora=recipe.method == "dora",
                              checkpointing=checkpointing, experts=entry.tuning.expert_parameters if experts else (),
                              frozen=entry.tuning.frozen)  # fmt: skip


def count_parameters(model: Any, *, quantised: bool) -> tuple[int, int, int]:
    """Return (all parameters, those in projections that become NF4, those that are trained)."""
    import torch

    plain = [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear]  # no other is what bitsandbytes takes
    linear = [m for name, m in plain if "lora_" not in name and "lm_head" not in name]
    return (sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linear) if quantised else 0,
            sum(p.numel() for p in model.parameters() if p.requires_grad))  # fmt: skip


def _spread(model: Any, processes: int) -> int:
    """Return how many frozen weights of a sharded model a process does not hold: two layers at a time are whole."""
    layers = layers_of(model.get_base_model())
    frozen = [sum(p.numel() for p in layer.parameters() if not p.requires_grad) for layer in layers]
    spread: int = sum(frozen) * (processes - 1) // processes - 2 * max(frozen)
    return max(0, spread)


def _file_bytes(entry: Model) -> int:
    """Return the size of the weights on disk, 0 where they are not."""
    folder = weights.on_disk(entry)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0


def _expected_tokens(recipe: Recipe) -> float:
    """Return how many tokens are learnt from, where only the recipe is known: half-full sequences."""
    s = recipe.schedule
    return (s.steps or 100) * s.rows_per_step / s.rows_per_prompt * s.max_tokens * 0.5


def _way_out(name: str, recipe: Recipe) -> str:
    """Return what to try when memory is short, the cheapest first."""
    schedule = recipe.schedule.model_dump()
    smaller = [setting for setting, values in SHRINKING if any(schedule[k] != v for k, v in values.items())]
    return f"--set {' --set '.join([*smaller, 'schedule.max_tokens=...'])}, or llmlab finetune {name} --rehearse"


def _free_gpu_memory() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


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
