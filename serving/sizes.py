"""How long a text an engine takes and how many it generates at once: as configured, or what the machine has room for.

    llama.cpp, vLLM on a CPU   4096 tokens; each place of llama.cpp reserves them all, and half of the free memory is for places
    vLLM on GPUs               as long as the model was made for, as far as the memory beside the weights holds it once

Nothing is started here; `serving.launch` asks once, and an engine, its gateway and all workers keep to the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from pipelines.architecture import Cache, cache_of, config_of
from pipelines.catalogue import Model
from pipelines.errors import ConfigError
from pipelines.hardware import Machine
from serving.settings import ServeConfig

GPU_RESERVE = 0.03  # of its memory, which vLLM's own start takes before it looks
USUAL_CONTEXT, LEAST_CONTEXT, CONTEXT_STEP = 4096, 256, 256
SLOTS_FOR_EACH_CPU, MOST_SLOTS, MEMORY_SHARE_OF_SLOTS = 4, 16, 0.5
CACHE_SHARE_OF_GPU = 0.8  # of what weights leave; the rest is for what vLLM computes with


class Sizes(NamedTuple):
    """What an engine is started with.

    Attributes:
        context_tokens: longest prompt and reply of one request.
        slots: sequences at once.
        gpu_memory_share: of each GPU, for weights and cache of vLLM.
    """

    context_tokens: int
    slots: int
    gpu_memory_share: float


def sizes_of(model: Model, config: ServeConfig, engine: str, machine: Machine, weight_bytes: int = 0) -> Sizes:
    """Return the sizes of an engine.

    Args:
        model: is served.
        config: with `context_tokens` and `slots`; what is null there is found here.
        engine: name of the engine.
        machine: that it runs on.
        weight_bytes: of the weights, which take a part of the GPUs.
    """
    cache = cache_of(config_of(model)) if model.config else None
    share, made_for = _gpu_memory_share(config, machine), model.context_tokens or USUAL_CONTEXT
    if engine == "vllm" and machine.gpus:
        gpus = min(card.memory_bytes for card in machine.gpus) * config.vllm.gpus * share
        longest, room = made_for, int(CACHE_SHARE_OF_GPU * (gpus - weight_bytes))
    else:
        longest, room = min(made_for, USUAL_CONTEXT), int(MEMORY_SHARE_OF_SLOTS * machine.free_memory_bytes)
    tokens = config.context_tokens or _context(longest, room, cache)
    slots: int | None = getattr(config.slots, engine)
    return Sizes(tokens, slots or _slots(machine.cpus, room, cache, tokens), share)


def check_context(model: Model, config: ServeConfig) -> None:
    """Raise `ConfigError` if the context is configured longer than the model was made for."""
    if config.context_tokens and model.context_tokens and config.context_tokens > model.context_tokens:
        raise ConfigError(
            f"context_tokens is {config.context_tokens}", f"at most {model.context_tokens}, which {model.name} was made for",
            f"--set context_tokens={model.context_tokens}",
        )  # fmt: skip


def _context(longest: int, room_bytes: int, cache: Cache | None) -> int:
    if cache is None:  # a model that is elsewhere
        return longest
    return max(LEAST_CONTEXT, min(longest, cache.longest(room_bytes) // CONTEXT_STEP * CONTEXT_STEP))


def _slots(cpus: int, room_bytes: int, cache: Cache | None, context_tokens: int) -> int:
    wanted = min(MOST_SLOTS, SLOTS_FOR_EACH_CPU * cpus)
    return max(1, min(wanted, room_bytes // cache.bytes(context_tokens))) if cache else wanted


def _gpu_memory_share(config: ServeConfig, machine: Machine) -> float:
    """Return the wanted share, or, of GPUs that others use too, what is free of the fullest but for a reserve."""
    used = machine.gpus[: config.vllm.gpus // config.vllm.nodes]
    free = [gpu.free_memory_bytes / gpu.memory_bytes for gpu in used if gpu.free_memory_bytes]
    return max(0.05, min([config.gpu_memory_share, *(round(share - GPU_RESERVE, 2) for share in free)]))
