"""A model of somebody else, behind the same gateway: any chat model that LangChain's `init_chat_model` knows.

It is an engine like the others: a process of its own that speaks OpenAI's chat API (serving.engines.provider_api) and passes
each request on. Prompts and passages leave this machine, so it is never chosen by itself. The key is in the environment,
under the name that the provider's own client reads. It is tested against this project's own gateway as an OpenAI endpoint;
it was not run against a paid provider. The supervisor runs:

    python -m serving.engines.provider --model openai:gpt-4o-mini --port 8081 ... [--base-url https://gateway.example/v1]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import catalogue
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.errors import ConfigError, EngineError
from serving.engines.abilities import Abilities, Lack, Words
from serving.engines.contract import Chat, Launch, LiveAdapters, Overflow, Trouble
from serving.settings import ProviderSettings

if TYPE_CHECKING:
    import httpx

PROVIDER = "provider"
_NO_KEY, _NO_PACKAGE = "no key in the environment: ", "no package for this provider: "


class Remote(NamedTuple):
    """What a provider's client needs: the environment variable with the key, if there is just one, and its package."""

    key: str
    package: str


REMOTES = {
    "openai": Remote("OPENAI_API_KEY", "langchain-openai"),
    "azure_openai": Remote("AZURE_OPENAI_API_KEY", "langchain-openai"),
    "anthropic": Remote("ANTHROPIC_API_KEY", "langchain-anthropic"),
    "google_genai": Remote("GOOGLE_API_KEY", "langchain-google-genai"),
    "mistralai": Remote("MISTRAL_API_KEY", "langchain-mistralai"),
    "cohere": Remote("COHERE_API_KEY", "langchain-cohere"),
    "groq": Remote("GROQ_API_KEY", "langchain-groq"),
    "bedrock_converse": Remote("", "langchain-aws"),  # AWS has many ways to sign in
}
LOCAL = ("huggingface", "ollama")  # not somebody else's: the first would fetch weights unseen, the second runs here


def remote_model(name: str, settings: ProviderSettings) -> Model:
    """Return the remote model as a catalogue entry: the one that the settings name, or else the catalogue's `name`.

    Raises:
        ConfigError: the catalogue gives no provider for the model, or the provider is none.
    """
    model = Model(name=settings.model, title=settings.model, facts={}, modality=["text"], provider=settings.model) if (
        settings.model) else catalogue.find(name)  # fmt: skip
    if model.provider is None:
        raise ConfigError(f"the catalogue names no provider for {name}", "a model that is had through an API",
                          "--set provider.model=openai:gpt-4o-mini, or without --engine provider")  # fmt: skip
    if model.provider.partition(":")[0] in LOCAL:
        raise ConfigError(f"{model.provider} is no remote model", f"one of {', '.join(REMOTES)}", "llmlab serve MODEL")
    return model


class Provider:
    """The `Engine` for remote models."""

    name = PROVIDER
    health_path = "/health"
    metrics_path = ""  # the gateway counts requests and tokens; there is no machine to watch
    metric_names: Mapping[str, str] = {}
    live_adapters: LiveAdapters | None = None
    has_adapters = False
    lacks: Sequence[Lack] = (Lack("prompt", lambda _: True, "a remote model is asked by chats only: /v1/chat/completions"),)
    schema_words: Words | None = None  # its own server refuses whatever it does not pass on

    def base_path(self, model: Model, pull: bool, say: Any) -> Path | None:  # noqa: ARG002 - part of the contract
        """Return None, since there are no weights here, and say where prompts go."""
        say(f"remote  {model.provider}: prompts and passages leave this machine (not run against a paid provider in our tests)")
        return None

    def command(self, launch: Launch) -> list[str]:
        """Return the command that runs `main` below; it holds no key."""
        assert launch.provider and launch.provider.model
        options = {
            "--model": launch.provider.model, "--host": launch.host, "--port": launch.port, "--slots": launch.slots,
            "--timeout-seconds": launch.provider.timeout_seconds,
        }  # fmt: skip
        if launch.provider.base_url:
            options["--base-url"] = launch.provider.base_url
        return [sys.executable, "-m", __name__, *(f"{name}={value}" for name, value in options.items())]

    def environment(self, launch: Launch) -> dict[str, str]:  # noqa: ARG002 - part of the contract
        """Let the process find this module, and send no traces of prompts to anybody."""
        return {"PYTHONPATH": str(ROOT), "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}

    def select(self, body: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
        """Change nothing: there is one model."""
        launch.adapter(body["model"])
        return dict(body)

    def render(self, client: httpx.Client, launch: Launch, chat: Chat) -> list[int]:  # noqa: ARG002
        """Raise `EngineError`: a provider does not show its tokens."""
        raise EngineError("a provider does not show its tokens", "an engine that runs here", "llmlab serve MODEL")

    def abilities(self, client: httpx.Client, launch: Launch) -> Abilities:  # noqa: ARG002 - part of the contract
        """Return that tools are not passed on, whatever the remote model can do."""
        return Abilities(None, frozenset(), False, "tools are not passed on to a remote model")

    def count(self, client: httpx.Client, launch: Launch, chat: Chat) -> int:  # noqa: ARG002 - part of the contract
        """Return an estimate from the length of the text; only the provider knows the number."""
        from langchain_core.messages.utils import convert_to_messages, count_tokens_approximately

        return int(count_tokens_approximately(convert_to_messages(chat)))

    def trouble(self, log: str) -> Trouble | None:
        """Know a key or a package that is missing."""
        if found := re.search(f"{_NO_KEY}(\\S+)", log):
            return Trouble(f"{found[1]} is not set", "the provider's key in the environment", f"export {found[1]}=...")
        if found := re.search(f"{_NO_PACKAGE}(\\S+)", log):
            return Trouble(f"{found[1]} is not installed", "the package that speaks to this provider",
                           f"{sys.executable} -m pip install {found[1]}")  # fmt: skip
        return None

    def overflow(self, error: Mapping[str, Any]) -> Overflow | None:  # noqa: ARG002 - part of the contract
        """Return None: each provider says it in words of its own, which are passed on."""
        return None


def main() -> None:
    """Make the client of the provider, listen, and serve until a signal ends the process."""
    options = _options()
    kind = options.model.partition(":")[0]
    remote = REMOTES.get(kind, Remote("", f"langchain-{kind.replace('_', '-')}"))
    if remote.key and not os.environ.get(remote.key):
        sys.exit(_NO_KEY + remote.key)
    import uvicorn

    from serving.engines.provider_api import RemoteModel, create_app

    model = RemoteModel(options.model, options.base_url or None, options.timeout_seconds, options.slots, remote.key)
    try:
        model.client()
    except ImportError:
        sys.exit(_NO_PACKAGE + remote.package)
    uvicorn.run(create_app(model), host=options.host, port=options.port, log_level="warning", access_log=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="OpenAI's chat API in front of a remote model")
    for name in ("--model", "--host", "--base-url"):
        parser.add_argument(name, default="")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--timeout-seconds", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
