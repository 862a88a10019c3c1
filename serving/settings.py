"""What a serving file (configs/serve/*.yaml) says: addresses, sizes, limits and times.

It holds no defaults; `configs/serve/default.yaml` does, each with the effect of its value.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from pipelines.config import Config, load, named


class Slots(Config):
    """How many sequences an engine generates at once."""

    llamacpp: int = Field(ge=1, le=256)
    vllm: int = Field(ge=1, le=4096)


class Restart(Config):
    """When an engine that ended by itself is started again; the delay doubles from the first to the longest."""

    first_delay_seconds: float = Field(gt=0)
    max_delay_seconds: float = Field(gt=0)
    settled_seconds: float = Field(ge=0, description="health for this long makes the next delay the first one again")


class ServeConfig(Config):
    """One way to serve a model."""

    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65535)
    engine: str
    engine_port: int = Field(ge=0, le=65535)
    index: str = Field(min_length=1)
    rag: str = Field(min_length=1, description="names the file of configs/rag that the index was built with")
    documents: str | None = Field(min_length=1, description="folder that /v1/documents changes; None for one beside the index")
    max_documents: int = Field(ge=1)
    max_document_bytes: int = Field(ge=1)
    context_tokens: int = Field(ge=256)
    slots: Slots
    gpu_memory_share: float = Field(gt=0, le=1, description="of a GPU's memory, for weights and cache of vLLM")
    speculation: bool = Field(description="let llama.cpp guess tokens from the text before")
    max_k: int = Field(ge=1, le=50, description="the retriever gives no more than 50 passages")
    max_question_chars: int = Field(ge=1)
    max_body_bytes: int = Field(ge=1024)
    default_max_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    startup_seconds: float = Field(gt=0)
    request_seconds: float = Field(gt=0)
    drain_seconds: int = Field(ge=0)
    restart: Restart

    @model_validator(mode="after")
    def _sizes_agree(self) -> ServeConfig:
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(f"default_max_tokens {self.default_max_tokens} is more than max_tokens {self.max_tokens}")
        if self.port and self.port == self.engine_port:
            raise ValueError(f"port and engine_port are both {self.port}")
        return self


def load_serve_config(name: str = "default", overrides: Sequence[str] = ()) -> ServeConfig:
    """Read configs/serve/<name>.yaml; `UnknownName` or `ConfigError` if that does not work."""
    return load(named("serve", name), ServeConfig, overrides)
