"""What an engine, with the model that it holds, can do of OpenAI's API; each engine's module fills this in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Lack(NamedTuple):
    """A field that an engine would leave out without a word, or take for something else.

    Attributes:
        field: of the request.
        asks: tells from the field's value whether it asks for what the engine lacks.
        reason: one sentence for the user.
    """

    field: str
    asks: Callable[[Any], bool]
    reason: str


class Words(NamedTuple):
    """The words of JSON schema that an engine obeys; the others it would leave out without a word.

    Attributes:
        known: keywords, those that only describe included.
        formats: values of `format`.
        bounded_types: types whose minimum and maximum hold.
        whole_patterns: True if a pattern has to be ^...$ and without (?...).
    """

    known: frozenset[str]
    formats: frozenset[str]
    bounded_types: frozenset[str]
    whole_patterns: bool


@dataclass(frozen=True)
class Abilities:
    """What only the running engine knows.

    Attributes:
        vocabulary: token ids are below this.
        tool_choices: the values of tool_choice that work, "named" for a choice by name; empty if tools do not work.
        parallel_tools: whether one reply may hold several calls.
        tools_reason: why a choice does not work; empty if all do.
    """

    vocabulary: int | None
    tool_choices: frozenset[str]
    parallel_tools: bool
    tools_reason: str
