"""What an engine must say about itself, so that one supervisor and one gateway serve them all.

An engine module builds a command line and translates at the edges. It starts no process, keeps no state and does no
batching: that is the work of the server it describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipelines.catalogue import Model
from pipelines.config import unknown
from pipelines.runs import Run
from serving.engines.abilities import Abilities, Lack, Words
from serving.settings import ProviderSettings, VllmSettings

if TYPE_CHECKING:
    import httpx

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Adapter:
    """A tuned adapter, which its run holds in both forms.

    Attributes:
        name: what a request's `model` says to get it.
        run: where it comes from, verified.
    """

    name: str
    run: Run

    @property
    def peft(self) -> Path:
        """Return the folder of adapter_config.json and adapter_model.safetensors."""
        return self.run.path / "adapter"

    @property
    def gguf(self) -> Path:
        """Return the same adapter as a GGUF LoRA."""
        return self.run.path / "adapter.gguf"


@dataclass(frozen=True)
class Launch:
    """Everything an engine needs to start.

    Attributes:
        model: what a request's `model` says to get the base.
        base: weights of the base, in the form that `Engine.base_path` returned; None for an engine that has none.
        adapters: served beside the base; the first one answers where a question names no model.
        host: address to listen on.
        port: port to listen on.
        context_tokens: longest prompt and reply of one request.
        slots: sequences generated at once.
        threads: CPU threads.
        gpu: True to generate on a GPU.
        gpu_memory_share: of the GPU's memory, that the engine may fill; 0..1.
        work: folder for the engine's log; its working directory.
        vllm: how vLLM spreads over GPUs and what it keeps for adapters; None for one GPU, and the adapters that there are.
        provider: which remote model answers; None for engines that run one.
        speculation: True to guess what comes next from what the prompt says, where the engine can.
    """

    model: str
    base: Path | None
    adapters: tuple[Adapter, ...]
    host: str
    port: int
    context_tokens: int
    slots: int
    threads: int
    gpu: bool
    work: Path
    gpu_memory_share: float = 0.9
    vllm: VllmSettings | None = None
    provider: ProviderSettings | None = None
    speculation: bool = False

    @property
    def url(self) -> str:
        """Return the address of the engine."""
        return f"http://{self.host}:{self.port}"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the valid values of `model`, base first."""
        return (self.model, *(adapter.name for adapter in self.adapters))

    @property
    def preferred(self) -> str:
        """Return the model for a question that names none: the first adapter, or the base."""
        return self.names[min(1, len(self.adapters))]

    def adapter(self, name: str) -> Adapter | None:
        """Return the adapter that a request's `model` names, None for the base.

        Raises:
            UnknownName: it is not served, or not any more.
        """
        if name not in self.names:
            raise unknown("served model", name[:80], self.names)
        return next((adapter for adapter in self.adapters if adapter.name == name), None)


class Overflow(NamedTuple):
    """A prompt that is longer than the context, in tokens; `prompt_tokens` is None if the engine does not say it."""

    prompt_tokens: int | None
    context_tokens: int


class Trouble(NamedTuple):
    """Why an engine did not start: what came, what was expected, and the next command."""

    came: str
    expected: str
    next_command: str


class LiveAdapters(Protocol):
    """How a running engine takes an adapter in and gives it up; errors are those of `httpx`."""

    def load(self, client: httpx.Client, launch: Launch, adapter: Adapter) -> None:
        """Take it in beside what is served."""

    def unload(self, client: httpx.Client, launch: Launch, adapter: Adapter) -> None:
        """Give it up."""


class Engine(Protocol):
    """One kind of server that speaks the OpenAI chat API over HTTP.

    Attributes:
        live_adapters: how adapters are changed while it runs; None if it has to be started anew with others.
        has_adapters: False if it serves none at all.
    """

    name: str
    live_adapters: LiveAdapters | None
    has_adapters: bool
    health_path: str
    metrics_path: str
    metric_names: Mapping[str, str]
    lacks: Sequence[Lack]
    schema_words: Words | None

    def base_path(self, model: Model, pull: bool, say: Any) -> Path | None:
        """Return the base weights in the engine's form, None if it needs none; `WeightsMissing` if they cannot be had."""

    def command(self, launch: Launch) -> list[str]:
        """Return the command line of the server."""

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return the environment variables to set for it, on top of the gateway's own."""

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
        """Return an OpenAI request body, changed so that its `model` answers; `UnknownName` if it is none of `launch.names`."""

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:
        """Return the token ids of a chat as the running engine sees it, up to where the reply begins."""

    def abilities(self, client: httpx.Client, launch: Launch) -> Abilities:
        """Return what the running engine can do with the model that it holds."""

    def count(self, client: httpx.Client, launch: Launch, chat: Chat) -> int:
        """Return how many tokens a chat has up to where the reply begins."""

    def trouble(self, log: str) -> Trouble | None:
        """Return why the engine did not start, if its log says it in a way that is known."""

    def overflow(self, error: Mapping[str, Any]) -> Overflow | None:
        """Return the sizes if an error object of the engine says that the prompt does not fit, else None."""
