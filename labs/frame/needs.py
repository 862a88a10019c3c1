"""What a lab can need beside the base install, whether it is here, and the command that brings it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from pipelines.errors import ConfigError

NeedName = Literal["converter", "preferences", "qwen", "translations", "chains", "qdrant", "prometheus"]


@dataclass(frozen=True)
class Need:
    """One of them.

    Attributes:
        what: for a person.
        command: brings it.
        is_here: looks, without loading anything.
    """

    what: str
    command: str
    is_here: Callable[[], bool]


def _converter() -> bool:
    from pipelines.export.convert import CONVERTER

    return CONVERTER.is_dir()


def _preferences() -> bool:
    from labs.frame.texts import preferences_file

    return preferences_file().is_file()


def _translations() -> bool:
    from labs.frame.texts import translated_languages

    return len(translated_languages()) >= 4


def _prometheus() -> bool:
    from monitoring.child_server import ProgramMissing
    from monitoring.prometheus_server import find_prometheus

    try:
        return bool(find_prometheus())
    except ProgramMissing:
        return False


NEEDS: dict[str, Need] = {
    "converter": Need("llama.cpp's converter", "make setup", _converter),
    "preferences": Need("hh_rlhf_harmless_test.jsonl.gz in the folder named by LLMLAB_DATA", "LLMLAB_DATA=folder llmlab lab run",
                        _preferences),
    "qwen": Need("Qwen's tokenizer and tiktoken to read it", "make setup-labs",
                 lambda: all(find_spec(name) is not None for name in ("dashscope", "tiktoken"))),
    "translations": Need("the translations of GNU coreutils below /usr/share/locale", "apt-get install --reinstall coreutils",
                         _translations),
    "chains": Need("LangChain's OpenAI client", "make setup-chains", lambda: find_spec("langchain_openai") is not None),
    "qdrant": Need("Qdrant's client, which keeps a store in a folder", "make setup-stores",
                   lambda: find_spec("qdrant_client") is not None),
    "prometheus": Need("Prometheus", "apt-get install prometheus, or PROMETHEUS=/path", _prometheus),
}  # fmt: skip


def missing(names: Sequence[str]) -> list[Need]:
    """Return those of `names` that are not here."""
    return [NEEDS[name] for name in names if not NEEDS[name].is_here()]


def check(lab: str, names: Sequence[str]) -> None:
    """Raise `ConfigError`, with the command that helps, unless everything a lab needs is here."""
    lacking = missing(names)
    if lacking:
        raise ConfigError(f"lab {lab} needs {', '.join(n.what for n in lacking)}", "all that its lab.yaml names",
                          "; ".join(dict.fromkeys(n.command for n in lacking)))  # fmt: skip
