"""llama.cpp's HTTP server, from the `xllamacpp` wheel, in a process of its own: the engine for machines without a GPU.

It serves a GGUF base and LoRAs, chosen per request. It cannot load one while it runs, so that `serving.adapters` starts
another one beside it. The supervisor runs:

    python -m serving.engines.llamacpp --model BASE.gguf --alias NAME --port 8081 ... [--lora ADAPTER.gguf ...]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.hardware import OPENMP_ENVIRONMENT
from serving.engines.abilities import Abilities, Lack, Words
from serving.engines.contract import Chat, Launch, LiveAdapters, Overflow, Trouble

if TYPE_CHECKING:
    import httpx

PROMPT_CACHE_MIB = 256  # llama.cpp keeps old prompts in memory, 8 GiB of them if it may: 9 GB after a thousand short requests
# After so many tokens that stand in the text before, the next so many are guessed to be the same; all are then computed at once.
GUESS_AFTER_TOKENS, GUESSED_TOKENS = 3, 12
NO_MEMORY = ("failed to allocate", "unable to allocate", "std::bad_alloc")
LARGEST_SEED = 2**32 - 2  # the one above means: any
SCHEMA_WORDS = Words(
    known=frozenset({
        "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
        "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "pattern", "format", "minimum",
        "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly",
    }),
    formats=frozenset({"date", "time", "date-time", "uuid"}),
    bounded_types=frozenset({"integer"}),
    whole_patterns=True,
)  # fmt: skip
WARNINGS_ONLY = 2  # llama.cpp logs each request at 3


class LlamaCpp:
    """The `Engine` for llama.cpp."""

    name = "llamacpp"
    health_path = "/health"
    metrics_path = "/metrics"
    live_adapters: LiveAdapters | None = None
    has_adapters = True
    metric_names: Mapping[str, str] = {
        "prompt_tokens": "llamacpp:prompt_tokens_total",
        "generated_tokens": "llamacpp:tokens_predicted_total",
        "running": "llamacpp:requests_processing",
        "waiting": "llamacpp:requests_deferred",
    }
    lacks: Sequence[Lack] = (
        Lack("echo", bool, "llama.cpp does not repeat the prompt"),
        Lack("seed", lambda seed: not 0 <= seed <= LARGEST_SEED, f"llama.cpp takes seeds from 0 to {LARGEST_SEED}"),
        Lack("tool_choice", lambda choice: isinstance(choice, dict), "llama.cpp takes no tool by name: send that one, required"),
    )
    schema_words: Words | None = SCHEMA_WORDS

    def base_path(self, model: Model, pull: bool, say: Any) -> Path:
        """Return the base as one GGUF file."""
        from pipelines.export.base import base_gguf

        return base_gguf(model, pull=pull, say=say)

    def command(self, launch: Launch) -> list[str]:
        """Return the command that runs `main` below."""
        options = {
            "--model": launch.base, "--alias": launch.model, "--host": launch.host, "--port": launch.port,
            "--context-tokens": launch.context_tokens, "--slots": launch.slots, "--threads": launch.threads,
            "--gpu-layers": -1 if launch.gpu else 0, "--speculation": int(launch.speculation),
        }  # fmt: skip
        loras = [f"--lora={adapter.gguf}" for adapter in launch.adapters]
        return [sys.executable, "-m", __name__, *(f"{name}={value}" for name, value in options.items()), *loras]

    def environment(self, launch: Launch) -> dict[str, str]:  # noqa: ARG002 - part of the contract
        """Let the process find this module from any working directory, and its threads share the cores."""
        return {"PYTHONPATH": str(ROOT), **OPENMP_ENVIRONMENT}

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
        """Scale the LoRA of the named adapter to 1 and all others to 0; a LoRA's id is its place in the command."""
        chosen = launch.adapter(body["model"])
        scales = [{"id": number, "scale": float(adapter is chosen)} for number, adapter in enumerate(launch.adapters)]
        rest = {key: value for key, value in body.items() if key != "lora"}
        return rest | {"lora": scales} if scales else rest

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:
        """Apply the template of the GGUF file, then tokenise the text as a chat request would be."""
        prompt = client.post(f"{launch.url}/apply-template", json={"messages": chat}).raise_for_status().json()["prompt"]
        text = {"content": prompt, "add_special": True, "parse_special": True}
        tokens: list[int] = client.post(f"{launch.url}/tokenize", json=text).raise_for_status().json()["tokens"]
        return tokens

    def abilities(self, client: httpx.Client, launch: Launch) -> Abilities:
        """Read the size of the vocabulary, and what the template of the GGUF file does with tools."""
        model = client.get(f"{launch.url}/v1/models").raise_for_status().json()["data"][0]
        template = client.get(f"{launch.url}/props").raise_for_status().json()["chat_template_caps"]
        choices = frozenset({"none", "auto", "required"}) if template["supports_tools"] else frozenset()
        reason = "" if choices else f"the chat template of {launch.model} shows no tools to the model"
        return Abilities(model["meta"]["n_vocab"], choices, template["supports_parallel_tool_calls"], reason)

    def count(self, client: httpx.Client, launch: Launch, chat: Chat) -> int:
        """Count what `render` returns."""
        return len(self.render(client, launch, chat))

    def trouble(self, log: str) -> Trouble | None:
        """Know memory that was not to be had for weights or cache."""
        if not any(text in log for text in NO_MEMORY):
            return None
        return Trouble("llama.cpp got no memory for the weights or the cache", "less to hold, or a machine with more memory",
                       "--set context_tokens=2048, or --set slots.llamacpp=1")  # fmt: skip

    def overflow(self, error: Mapping[str, Any]) -> Overflow | None:
        """Read llama.cpp's own error type, which carries both numbers."""
        if error.get("type") != "exceed_context_size_error":
            return None
        return Overflow(error["n_prompt_tokens"], error["n_ctx"])


def main() -> None:
    """Load the model, listen, and serve until a signal ends the process."""
    import xllamacpp

    options = _options()
    try:
        server = xllamacpp.Server(_parameters(options))
    except RuntimeError as error:  # llama.cpp has logged the cause
        sys.exit(str(error))
    while server.listening_address:
        signal.pause()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llama.cpp's HTTP server")
    for name in ("--model", "--alias", "--host"):
        parser.add_argument(name, default="")
    parser.add_argument("--lora", action="append", default=[])
    for name in ("--port", "--context-tokens", "--slots", "--threads", "--gpu-layers", "--speculation"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()


def _parameters(options: argparse.Namespace) -> Any:
    """Return llama.cpp's parameters; the context is given per slot here and for all slots there."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.model_alias = options.model, {options.alias}
    parameters.hostnames, parameters.port = [options.host], options.port
    parameters.n_ctx, parameters.n_parallel = options.context_tokens * options.slots, options.slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    parameters.n_gpu_layers = options.gpu_layers
    parameters.use_jinja, parameters.ui, parameters.endpoint_metrics = True, False, True
    parameters.prefill_assistant = False  # or it would go on with an assistant's last message, and repeat it
    parameters.fit_params = False  # or llama.cpp would shrink the context to fit, without an error
    parameters.cache_ram_mib = 0 if options.lora else PROMPT_CACHE_MIB  # it gives one adapter what another one computed
    parameters.cors_origins = f"http://{options.host}:{options.port}"  # or any web page could call it from a browser
    parameters.verbosity = WARNINGS_ONLY
    parameters.lora_adapters = [_lora(path) for path in options.lora]
    if options.speculation:
        parameters.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        ngram = parameters.speculative.ngram_simple
        ngram.size_n, ngram.size_m = GUESS_AFTER_TOKENS, GUESSED_TOKENS
    return parameters


def _lora(path: str) -> Any:
    """Return a LoRA that is off unless a request turns it on."""
    import xllamacpp

    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = path, 0.0
    return lora


if __name__ == "__main__":
    main()
