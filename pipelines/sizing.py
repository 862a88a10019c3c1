"""What a model takes to serve and to tune in 16, 8 and 4 bits, and how many GPUs that is. `llmlab plan NAME`

It is arithmetic on the true architecture, which is built on the meta device; nothing of it was measured on these GPUs. Bits
of served weights are those of GGUF's blocks, which this project exports; of tuned ones those of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipelines.architecture import Cache
from pipelines.catalogue import Model
from pipelines.config import Config, load, named
from pipelines.plan import NF4_BITS, Batch, count_parameters, largest_of, meta_model, step_bytes
from pipelines.tune.recipe import Lora, Recipe

MATRIX_BITS = {16: 16.0, 8: 8.5, 4: 4.5}  # Q8_0 and Q4_K: a scale for each 32 weights, or two levels of them for 256
EMBEDDING_BITS = {16: 16.0, 8: 8.5, 4: 6.5625}  # Q6_K; pipelines.export.quantise never takes fewer bits for these
TUNED_BITS = {16: 16.0, 8: 8.0, 4: NF4_BITS}  # of projections; what is none stays in 16
TUNED_BYTES = 4 + 4 + 8  # adapter, gradient and AdamW's two moments, all in 32 bits
PLAIN = Lora(rank=16, alpha=32, dropout=0.0)
GIB = 2**30


class Gpu(Config):
    """A GPU that can be bought or rented."""

    name: str
    memory_gib: float = Field(gt=0)


class Gpus(Config):
    """configs/gpus/common.yaml."""

    usable_share: float = Field(gt=0, le=1)
    overhead_gib: float = Field(ge=0)
    counts: list[int] = Field(min_length=1)
    gpus: list[Gpu] = Field(min_length=1)

    def room(self, gpu: Gpu, count: int) -> int:
        """Return the bytes that `count` of a GPU have for weights and cache."""
        return int(count * (gpu.memory_gib * self.usable_share - self.overhead_gib) * GIB)


@dataclass(frozen=True)
class Need:
    """In one precision of the weights, bytes.

    Attributes:
        bits: 16, 8 or 4.
        serve_bytes: weights alone; the cache of the texts comes on top.
        tune_bytes: everything that training an adapter takes.
    """

    bits: int
    serve_bytes: int
    tune_bytes: int


@dataclass(frozen=True)
class Fit:
    """How a model is served on one kind of GPU.

    Attributes:
        gpus: the fewest that hold the weights and the cache of one text.
        at_once: how many texts of the wanted length they hold the cache of.
        longest: the longest single text there is room for, in tokens, or what the model was made for if that is less.
    """

    gpus: int
    at_once: int
    longest: int


def gpus() -> Gpus:
    """Return the table of GPUs."""
    return load(named("gpus", "common"), Gpus)


def needs(entry: Model, recipe: Recipe) -> tuple[list[Need], Batch]:
    """Return the needs in 16, 8 and 4 bits, and the step that tuning them is planned for: the largest of the recipe."""
    method = recipe if recipe.lora else recipe.model_copy(update={"method": "lora", "preference": None})
    shape = recipe.lora or PLAIN
    model, batch = meta_model(entry, method, shape, experts=True), largest_of(recipe)
    activations = step_bytes(model, entry, method, shape, batch, 2)
    total, projections, trained = count_parameters(model, quantised=True)
    found = []
    for bits, of_tuned in TUNED_BITS.items():
        base = projections * of_tuned / 8 + (total - trained - projections) * 2
        found.append(Need(bits, served_bytes(model, bits), int(base) + TUNED_BYTES * trained + activations))
    return found, batch


def served_bytes(model: Any, bits: int) -> int:
    """Return the size of a model's weights, without its adapter, when its matrices have `bits`."""
    kept = [e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    embeddings = {id(weight) for weight in kept}
    size = 0.0
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        width = EMBEDDING_BITS[bits] if id(weight) in embeddings else MATRIX_BITS[bits] if weight.dim() > 1 else 16
        size += weight.numel() * width / 8
    return int(size)


def fit(table: Gpus, gpu: Gpu, weight_bytes: int, cache: Cache, context_tokens: int, made_for: int) -> Fit | None:
    """Return on how many of a GPU a model is served, or None if all that one machine has are not enough.

    Args:
        table: with the shares and counts.
        gpu: one of it.
        weight_bytes: of the model.
        cache: how its cache grows.
        context_tokens: length of each text.
        made_for: the longest text of the model.
    """
    for count in table.counts:
        left = table.room(gpu, count) - weight_bytes
        at_once = left // cache.bytes(context_tokens)
        if at_once >= 1:
            return Fit(count, at_once, min(made_for, cache.longest(left)))
    return None


def fewest(table: Gpus, gpu: Gpu, size_bytes: int) -> int | None:
    """Return how many of a GPU hold so many bytes together, or None if a machine's are not enough."""
    return next((count for count in table.counts if table.room(gpu, count) >= size_bytes), None)
