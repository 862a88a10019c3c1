"""What a serving file (configs/serve/*.yaml) says: addresses, sizes, limits and times.

It holds no defaults; `configs/serve/default.yaml` does, each with the effect of its value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipelines.catalogue import PROVIDER_MODEL
from pipelines.config import Config, load, named

ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?")  # "*" would let any page on the web use a server on loopback


class Slots(Config):
    """How many sequences an engine generates at once."""

    llamacpp: int | None = Field(ge=1, le=256, description="null: by cores and memory")
    vllm: int = Field(ge=1, le=4096)
    provider: int = Field(ge=1, le=4096)


class VllmSettings(Config):
    """How vLLM spreads over GPUs, and what it keeps for adapters that come while it runs."""

    tensor_parallel: int = Field(ge=1, le=64)
    pipeline_parallel: int = Field(ge=1, le=64)
    nodes: int = Field(ge=1, le=64)
    spare_adapters: int = Field(ge=0, le=64)
    lora_rank: int = Field(ge=1, le=512)

    @property
    def gpus(self) -> int:
        """Return how many GPUs there are to be, on all nodes together."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _nodes_are_alike(self) -> VllmSettings:
        if self.gpus % self.nodes:
            raise ValueError(f"{self.gpus} GPUs (tensor_parallel x pipeline_parallel) do not spread over {self.nodes} nodes")
        return self


class ProviderSettings(Config):
    """Which remote model answers; its key is in the environment, under the name that the provider's own client reads."""

    model: str | None = Field(pattern=PROVIDER_MODEL)
    base_url: str | None = Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$", description="without a key or a password in it")
    timeout_seconds: float = Field(gt=0)


class Restart(Config):
    """When an engine that ended by itself is started again; the delay doubles from the first to the longest."""

    first_delay_seconds: float = Field(gt=0)
    max_delay_seconds: float = Field(gt=0)
    settled_seconds: float = Field(ge=0, description="health for this long makes the next delay the first one again")
    open_after_failures: int = Field(ge=1, description="failures in a row after which the engine is left alone for a while")
    open_seconds: float = Field(gt=0, description="how long")


class AdmissionBounds(Config):
    """How many generations run and wait; over it a request is refused at once with 429."""

    running: int | None = Field(ge=1, description="sequences at once; None for the engine's slots")
    queued: int | None = Field(ge=0, description="generations that wait; None for as many as run")
    queued_tokens: int = Field(ge=1, description="of the prompts that wait, estimated")
    wait_seconds: float = Field(gt=0)

    def share(self, slots: int, workers: int, number: int) -> AdmissionBounds:
        """Return what one of several workers may let in, so that all together let in as much as these bounds say.

        Args:
            slots: sequences that the engine generates at once.
            workers: how many there are; at most as many as may run at once.
            number: which of them, from 0.
        """
        running = _part(self.running or slots, workers, number)
        queued = None if self.queued is None else _part(self.queued, workers, number)
        tokens = max(1, self.queued_tokens // workers)
        return self.model_copy(update={"running": running, "queued": queued, "queued_tokens": tokens})


class ConnectionBounds(Config):
    """How many clients there may be, and how slow."""

    limit: int = Field(ge=1)
    header_seconds: float = Field(gt=0)
    body_seconds: float = Field(gt=0)
    body_bytes_per_second: int = Field(ge=1)
    send_seconds: float = Field(gt=0)

    def share(self, workers: int, number: int) -> ConnectionBounds:
        """Return the bounds of one of several workers."""
        return self.model_copy(update={"limit": max(1, _part(self.limit, workers, number))})


def _part(whole: int, workers: int, number: int) -> int:
    """Return a worker's part of a number; the first ones have what cannot be divided."""
    return whole // workers + (number < whole % workers)


Off = BeforeValidator(lambda value: "off" if value is False else value)  # YAML reads a bare off as false
GuardAction = Annotated[Literal["off", "report", "redact", "block"], Off]
Refusal = Annotated[Literal["off", "report", "block"], Off]


class PrivateGuard(Config):
    """What is done about private data in what is asked, in passages, and in replies."""

    input: GuardAction
    chunks: GuardAction
    output: GuardAction


class InjectionGuard(Config):
    """What is done about orders in what is asked; passages are screened by configs/rag, `screen`."""

    input: Refusal


class RepetitionGuard(Config):
    """What is done about a reply that says the same run of words again and again."""

    output: Refusal
    words: int = Field(ge=2, le=64)
    times: int = Field(ge=2)


class LengthGuard(Config):
    """What is done about a reply with too many characters."""

    output: Refusal
    max_chars: int = Field(ge=1)


class GuardConfig(Config):
    """What each guard does (serving.guard): off, report, redact or block."""

    secrets: PrivateGuard
    personal: PrivateGuard
    injection: InjectionGuard
    repetition: RepetitionGuard
    length: LengthGuard


class LogConfig(Config):
    """What is logged, in which form, and where to (serving.logs)."""

    format: Literal["text", "json"]
    level: Literal["debug", "info", "warning", "error"]
    file: str | None = Field(min_length=1, description="None for standard error")
    prompts: bool


class TraceConfig(Config):
    """Where traces go (serving.traces)."""

    otlp_endpoint: str | None = Field(pattern=r"^https?://[^/\s]+", description="None for OTEL_EXPORTER_OTLP_ENDPOINT, if set")


class Prices(Config):
    """Dollars for a million tokens (serving.prices)."""

    prompt: float | None = Field(ge=0, description="None for what the catalogue says")
    reply: float | None = Field(ge=0)


class SchemaLimits(Config):
    """How large a JSON schema in a request may be; an engine consults its grammar for each token."""

    max_bytes: int = Field(ge=2)
    max_depth: int = Field(ge=1, le=32)
    max_properties: int = Field(ge=1)
    max_alternatives: int = Field(ge=1, description="in anyOf, oneOf, allOf and enum, together")
    max_refs: int = Field(ge=0)
    max_repeats: int = Field(ge=1, description="minLength, maxLength, minItems and so on; the braces of a pattern, multiplied")
    max_pattern_chars: int = Field(ge=1)


class RequestLimits(Config):
    """What one request may ask for."""

    max_choices: int = Field(ge=1, description="n, or n times the prompts of a completion")
    max_messages: int = Field(ge=1)
    max_prompt_chars: int = Field(ge=1, description="all messages, or all prompts; a token id counts as one")
    max_stop_sequences: int = Field(ge=1)
    max_stop_chars: int = Field(ge=1)
    max_logit_biases: int = Field(ge=0)
    max_top_logprobs: int = Field(ge=0, le=20)
    max_top_k: int = Field(ge=1)
    max_tools: int = Field(ge=0)
    max_embedding_inputs: int = Field(ge=1)
    schemas: SchemaLimits


class ServeConfig(Config):
    """One way to serve a model."""

    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65535)
    engine: str
    engine_port: int = Field(ge=0, le=65535)
    workers: int = Field(
        ge=1,
        le=64,
        description="gateway processes on one port, before one engine. Each has its own index and embedder in memory, and an "
        "equal part of admission and connections. Budgets and rates of keys count for all together, but each worker may "
        "overdraw a day's tokens by one generation. Metrics add up. The API changes no adapters and documents with several",
    )
    keys: str | None = Field(min_length=1, description="file of API keys; None where none is ever needed on loopback")
    cors_origins: list[str] = Field(description="web pages of these origins may ask from a browser")
    tls_cert: str | None = Field(min_length=1)
    tls_key: str | None = Field(min_length=1)
    index: str = Field(min_length=1)
    rag: str = Field(min_length=1, description="names the file of configs/rag that the index was built with")
    documents: str | None = Field(min_length=1, description="folder that /v1/documents changes; None for one beside the index")
    max_documents: int = Field(ge=1)
    max_document_bytes: int = Field(ge=1)
    context_tokens: int | None = Field(ge=256, description="null: what the machine has room for, see serving.sizes")
    slots: Slots
    gpu_memory_share: float = Field(gt=0, le=1, description="of a GPU's memory, for weights and cache of vLLM")
    speculation: bool = Field(description="let llama.cpp guess tokens from the text before")
    max_k: int = Field(ge=1, le=50, description="the retriever gives no more than 50 passages")
    max_question_chars: int = Field(ge=1)
    max_body_bytes: int = Field(ge=1024)
    default_max_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    requests: RequestLimits
    startup_seconds: float = Field(gt=0)
    request_seconds: float = Field(gt=0)
    drain_seconds: int = Field(ge=0)
    restart: Restart
    admission: AdmissionBounds
    connections: ConnectionBounds
    guard: GuardConfig
    log: LogConfig
    trace: TraceConfig
    prices: Prices
    vllm: VllmSettings
    provider: ProviderSettings

    @model_validator(mode="after")
    def _sizes_agree(self) -> ServeConfig:
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(f"default_max_tokens {self.default_max_tokens} is more than max_tokens {self.max_tokens}")
        if self.port and self.port == self.engine_port:
            raise ValueError(f"port and engine_port are both {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_cert and tls_key")
        if wrong := [origin for origin in self.cors_origins if not ORIGIN.fullmatch(origin)]:
            raise ValueError(f"cors_origins has {wrong[0]!r}, and not a list of origins like https://app.example")
        return self


def load_serve_config(name: str = "default", overrides: Sequence[str] = ()) -> ServeConfig:
    """Read configs/serve/<name>.yaml; `UnknownName` or `ConfigError` if that does not work."""
    return load(named("serve", name), ServeConfig, overrides)
