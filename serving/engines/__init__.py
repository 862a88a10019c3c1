"""Engines: existing servers, each described by one module; `named` finds it."""

from __future__ import annotations

from pipelines.errors import ConfigError
from serving.engines.contract import Engine


def named(name: str) -> Engine:
    """Return the engine called `name`, as `pipelines.hardware.choose_engine` names it.

    Raises:
        ConfigError: there is no such engine.
    """
    from serving.engines.llamacpp import LlamaCpp
    from serving.engines.provider import Provider
    from serving.engines.vllm import Vllm

    engines: dict[str, Engine] = {"llamacpp": LlamaCpp(), "vllm": Vllm(), "provider": Provider()}
    if name not in engines:
        raise ConfigError(f"there is no engine named {name!r}", f"one of {', '.join(engines)}")
    return engines[name]
