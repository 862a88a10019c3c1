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

USUAL_CONTEXT, LEAST_CONTEXT, CONTEXT_STEP = 4096, 256, 256
SLOTS_FOR_EACH_CPU, MOST_SLOTS, MEMORY_SHARE_OF_SLOTS = 2, 16, 0.5
CACHE_SHARE_OF_GPU = 0.8  # of what weights leave; the rest is for what vLLM computes with


class Sizes(NamedTuple):
    """What an engine is started with: the longest prompt and reply of one request, in tokens, and sequences at once."""

    context_tokens: int
    slots: int


def sizes_of(model: Model, config: ServeConfig, engine: str, machine: Machine, weight_bytes: int = 0) -> Sizes:
    """Return the sizes of an engine.

    Args:
        model: is served.
        config: with `context_tokens` and `slots`; what is null there is found here.
        engine: name of the engine.
        machine: that it runs on.
        weight_bytes: of the weights, which take a part of the GPUs.

    Raises:
        ConfigError: the context is longer than the model was made for.
    """
    cache = cache_of(config_of(model)) if model.config else None
    tokens = config.context_tokens or _context(model, config, engine, machine, cache, weight_bytes)
    made_for = model.context_tokens or tokens
    if tokens > made_for:
        raise ConfigError(f"context_tokens is {tokens}", f"at most {made_for}, which {model.name} was made for",
                          f"--set context_tokens={made_for}")  # fmt: skip
    wanted: int | None = getattr(config.slots, engine)
    return Sizes(tokens, wanted or _slots(machine, cache, tokens))


def _context(
    model: Model, config: ServeConfig, engine: str, machine: Machine, cache: Cache | None, weight_bytes: int
) -> int:  # fmt: skip
    if cache is None:  # a model that is elsewhere
        return model.context_tokens or USUAL_CONTEXT
    made_for, room = model.context_tokens or USUAL_CONTEXT, int(MEMORY_SHARE_OF_SLOTS * machine.free_memory_bytes)
    if engine == "vllm" and machine.gpus:
        memory = min(card.memory_bytes for card in machine.gpus) * config.vllm.gpus * config.gpu_memory_share
        room = int(CACHE_SHARE_OF_GPU * (memory - weight_bytes))
    else:
        made_for = min(made_for, USUAL_CONTEXT)
    fits = cache.longest(room) // CONTEXT_STEP * CONTEXT_STEP
    return max(LEAST_CONTEXT, min(made_for, fits))


def _slots(machine: Machine, cache: Cache | None, context_tokens: int) -> int:
    wanted = min(MOST_SLOTS, SLOTS_FOR_EACH_CPU * machine.cpus)
    if cache is None:
        return wanted
    return max(1, min(wanted, int(MEMORY_SHARE_OF_SLOTS * machine.free_memory_bytes) // cache.bytes(context_tokens)))
