"""How long a text and how many at once: what cores, memory and GPUs have room for, unless it is configured."""

from __future__ import annotations

import pytest

from pipelines import catalogue
from pipelines.architecture import cache_of, config_of
from pipelines.errors import ConfigError
from pipelines.hardware import Gpu, Machine
from serving.settings import load_serve_config
from serving.sizes import check_context, sizes_of
from tests.serving.conftest import MODEL

GIB = 2**30


def machine(cpus: int = 2, free_bytes: int = 16 * GIB, gpus: int = 0, gpu_free_bytes: int = 24 * GIB) -> Machine:
    return Machine(cpus, (), 2**40, free_bytes, 0, (Gpu("a GPU", 24 * GIB, gpu_free_bytes, "580"),) * gpus)


@pytest.mark.parametrize(("cpus", "free_bytes", "slots"), [(2, 2**34, 8), (64, 2**40, 16), (64, 2**30, 5)])
def test_slots_follow_cores_and_memory(cpus: int, free_bytes: int, slots: int) -> None:
    """A context of 4096 tokens: 30 layers, 3 heads of 64, keys and values in 2 bytes; half of the memory is for contexts."""
    assert 30 * 3 * 64 * 2 * 2 * 4096 * 5 < 2**30 / 2 < 30 * 3 * 64 * 2 * 2 * 4096 * 6
    model = catalogue.runnable(MODEL)
    assert sizes_of(model, load_serve_config("default", []), "llamacpp", machine(cpus, free_bytes))[:2] == (4096, slots)
    assert sizes_of(model, load_serve_config("default", ["slots.llamacpp=7"]), "llamacpp", machine(cpus, free_bytes)).slots == 7


def test_a_small_machine_gets_a_short_context() -> None:
    model = catalogue.runnable(MODEL)
    sizes = sizes_of(model, load_serve_config("default", []), "llamacpp", machine(free_bytes=128 * 2**20))
    assert sizes.context_tokens % 256 == 0 and sizes.slots == 1
    a_token = 30 * 3 * 64 * 2 * 2
    assert sizes.context_tokens * a_token <= 64 * 2**20 < (sizes.context_tokens + 256) * a_token
    assert sizes_of(model, load_serve_config("default", []), "llamacpp", machine(free_bytes=0))[:2] == (256, 1)


def test_on_gpus_it_is_as_long_as_the_model_was_made_for_or_the_memory_holds() -> None:
    mistral, llama = catalogue.runnable("mistral-7b"), catalogue.runnable("llama-2-13b")
    given = load_serve_config("default", [])
    assert sizes_of(mistral, given, "vllm", machine(gpus=1), int(14.5e9)).context_tokens == mistral.context_tokens
    assert sizes_of(mistral, given, "vllm", machine(), int(14.5e9)).context_tokens == 4096, "on a CPU"
    tight = sizes_of(mistral, given, "vllm", machine(gpus=1), int(22.8e9)).context_tokens
    room = 24 * GIB * given.gpu_memory_share - 22.8e9
    assert 256 < tight < 4096 and cache_of(config_of(mistral)).bytes(tight) < 0.8 * room
    two = load_serve_config("default", ["vllm.tensor_parallel=2"])
    assert sizes_of(llama, two, "vllm", machine(gpus=2), int(26e9))[:2] == (llama.context_tokens, given.slots.vllm)


def test_on_a_gpu_that_others_use_the_context_fits_what_they_leave() -> None:
    mistral, given = catalogue.runnable("mistral-7b"), load_serve_config("default", [])
    alone = sizes_of(mistral, given, "vllm", machine(gpus=1), int(14.5e9))
    shared = sizes_of(mistral, given, "vllm", machine(gpus=1, gpu_free_bytes=16 * GIB), int(14.5e9))
    assert shared.gpu_memory_share == 0.64 < alone.gpu_memory_share == 0.9
    assert 256 < shared.context_tokens < alone.context_tokens
    assert cache_of(config_of(mistral)).bytes(shared.context_tokens) < 0.64 * 24 * GIB - 14.5e9


@pytest.mark.parametrize(("free_gib", "share"), [(None, 0.9), (24, 0.9), (12, 0.47), (0, 0.9), (0.15, 0.05)])  # 0: not told
def test_a_gpu_is_asked_for_what_is_free_of_it(free_gib: float | None, share: float) -> None:
    here = machine() if free_gib is None else machine(gpus=1, gpu_free_bytes=int(free_gib * GIB))
    assert sizes_of(catalogue.runnable(MODEL), load_serve_config("default", []), "vllm", here).gpu_memory_share == share


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_tokens is 100000"):
        check_context(catalogue.runnable(MODEL), load_serve_config("default", ["context_tokens=100000"]))


def test_of_a_model_that_is_elsewhere_nothing_is_known() -> None:
    remote = catalogue.find("gpt-4o")
    assert remote.context_tokens is None
    assert sizes_of(remote, load_serve_config("default", []), "provider", machine()).context_tokens == 4096
    assert (
        sizes_of(remote, load_serve_config("default", ["context_tokens=100000"]), "provider", machine()).context_tokens == 100_000
    )
