"""What an engine must say about itself, so that one supervisor and one gateway serve them all.

An engine module builds a command line and translates at the edges. It starts no process, keeps no state and does no
batching: that is the work of the server it describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipelines.catalogue import Model

if TYPE_CHECKING:
    import httpx

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Adapter:
    """A tuned adapter in both forms.

    Attributes:
        name: what a request's `model` says to get it.
        peft: folder of adapter_config.json and adapter_model.safetensors.
        gguf: the same adapter as a GGUF LoRA.
    """

    name: str
    peft: Path
    gguf: Path


@dataclass(frozen=True)
class Launch:
    """Everything an engine needs to start.

    Attributes:
        model: what a request's `model` says to get the base.
        base: weights of the base, in the form that `Engine.base_path` returned.
        adapter: served beside the base, or None.
        host: address to listen on.
        port: port to listen on.
        context_tokens: longest prompt and reply of one request.
        slots: sequences generated at once.
        threads: CPU threads.
        gpu: True to generate on a GPU.
        gpu_memory_share: of the GPU's memory, that the engine may fill; 0..1.
        work: folder for the engine's log; its working directory.
        speculation: True to guess what comes next from what the prompt says, where the engine can.
    """

    model: str
    base: Path
    adapter: Adapter | None
    host: str
    port: int
    context_tokens: int
    slots: int
    threads: int
    gpu: bool
    work: Path
    gpu_memory_share: float = 0.9
    speculation: bool = False

    @property
    def url(self) -> str:
        """Return the address of the engine."""
        return f"http://{self.host}:{self.port}"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the valid values of `model`, base first."""
        return (self.model, self.adapter.name) if self.adapter else (self.model,)


class Overflow(NamedTuple):
    """A prompt that is longer than the context, in tokens; `prompt_tokens` is None if the engine does not say it."""

    prompt_tokens: int | None
    context_tokens: int


class Trouble(NamedTuple):
    """Why an engine did not start: what came, what was expected, and the next command."""

    came: str
    expected: str
    next_command: str


class Engine(Protocol):
    """One kind of server that speaks the OpenAI chat API over HTTP."""

    name: str
    health_path: str
    metrics_path: str
    metric_names: Mapping[str, str]

    def base_path(self, model: Model, pull: bool, say: Any) -> Path:
        """Return the base weights in the engine's form; `WeightsMissing` if they cannot be had."""

    def command(self, launch: Launch) -> list[str]:
        """Return the command line of the server."""

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return the environment variables to set for it, on top of the gateway's own."""

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
        """Return an OpenAI request body, changed so that its `model`, one of `launch.names`, is the one that answers."""

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:
        """Return the token ids of a chat as the running engine sees it, up to where the reply begins."""

    def trouble(self, log: str) -> Trouble | None:
        """Return why the engine did not start, if its log says it in a way that is known."""

    def overflow(self, error: Mapping[str, Any]) -> Overflow | None:
        """Return the sizes if an error object of the engine says that the prompt does not fit, else None."""
