"""One reply of the engine on its way through the guards: each text in it (content, reasoning, arguments of a tool) by itself.

Log-probabilities name the tokens of a text, so they wait as long as it does, and those of what was replaced are dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from serving.guard.contract import Told, Window

Windows = Callable[[], list[Window]]
Key = tuple[str, int]  # the field of a text, and the number of the tool call it belongs to
FIELDS = frozenset({"content", "reasoning_content", "reasoning", "refusal"})


class AtEnd:
    """Lets a text out as it comes, and shows it to a window with the action "report" once it is at its end.

    Args:
        window: what it lets out goes nowhere, what it found is told.
    """

    held = stopped = False

    def __init__(self, window: Window) -> None:
        self.name, self.action, self.finish_reason, self.found = window.name, window.action, window.finish_reason, window.found
        self._window, self._pieces = window, list[str]()

    def feed(self, piece: str) -> str:
        """Let the piece out."""
        self._pieces.append(piece)
        return piece

    def end(self) -> str:
        """Look at all of it."""
        self._window.feed("".join(self._pieces))
        self._window.end()
        self._pieces.clear()
        return ""


class Chain:
    """The windows that one text goes through, one after the other."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows
        self.stopped: Window | None = None

    @property
    def held(self) -> bool:
        """Return True if a part of the text waits."""
        return any(window.held for window in self.windows)

    @property
    def changes(self) -> int:
        """Return how often the text was changed or stopped."""
        return sum(len(window.found) for window in self.windows if window.action != "report")

    def feed(self, piece: str) -> str:
        """Return what may go out; what comes after the end of a stopped text is dropped."""
        if self.stopped:
            return ""
        for place, window in enumerate(self.windows):
            piece = window.feed(piece)
            if window.stopped:
                self.stopped = window
                return _ended(self.windows[place + 1 :], piece)
        return piece

    def end(self) -> str:
        """Return what was held."""
        return "" if self.stopped else _ended(self.windows, "")


class Choice:
    """One of the replies that were asked for with `n`.

    Attributes:
        finish_reason: if a guard stopped it.
        ended: True if nothing of it follows.
    """

    def __init__(self, windows: Windows, told: Told) -> None:
        self.finish_reason: str | None = None
        self.ended = False
        self._windows, self._told, self._changes = windows, told, 0
        self._chains: dict[Key, Chain] = {}
        self._logprobs: list[Mapping[str, Any]] = []

    def feed(self, choice: dict[str, Any], part: str) -> None:
        """Replace the texts of a choice; `part` names where they are: delta or message."""
        for key, holder in _texts(choice, choice.get(part) or {}):
            chain = self._chains.get(key) or self._chains.setdefault(key, Chain(self._windows()))
            holder[key[0]] = chain.feed(holder[key[0]])
            if chain.stopped:
                self.finish_reason = self.finish_reason or chain.stopped.finish_reason
        if choice.get("logprobs"):
            self._logprobs.append(choice["logprobs"])

    def end(self, choice: dict[str, Any], part: str) -> None:
        """Add the texts that were held, and count what was found."""
        for (field, number), rest in self.close().items():
            holder = _holder(choice, part, field, number)
            holder[field] = (holder.get(field) or "") + rest
        choice["finish_reason"] = self.finish_reason or choice.get("finish_reason")

    def close(self) -> dict[Key, str]:
        """Look at the ends of all texts and count what was found, once; return what was held of each."""
        if self.ended:
            return {}
        self.ended = True
        rests = {key: rest for key, chain in self._chains.items() if (rest := chain.end())}
        for window in (window for chain in self._chains.values() for window in chain.windows):
            self._told.decide(window.name, "output", window.action, window.found)
        return rests

    def logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of what went out."""
        changes = sum(chain.changes for chain in self._chains.values())
        if changes > self._changes:
            self._logprobs.clear()
        self._changes = changes
        if not self.ended and any(chain.held for chain in self._chains.values()):
            return None
        merged: dict[str, Any] = {}
        for name, value in (item for one in self._logprobs for item in one.items()):
            merged[name] = merged[name] + value if isinstance(merged.get(name), list) and isinstance(value, list) else value
        self._logprobs.clear()
        return merged or None


class Reply:
    """All choices of a reply.

    Attributes:
        seconds: that the guards took so far.
    """

    def __init__(self, windows: Windows, told: Told, choices: int) -> None:
        self.seconds = 0.0
        self._told, self._asked = told, choices
        self._new = partial(Choice, windows, told)
        self._choices: dict[int, Choice] = {}
        self._ended = 0

    @property
    def over(self) -> bool:
        """Return True if all choices are at their end and the engine may still be writing one of them."""
        return self._ended == self._asked and any(choice.finish_reason for choice in self._choices.values())

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Return a completion as it may go out."""
        for choice in completion.get("choices", ()):
            self._pass(self._begun(choice), choice, "message", at_end=True)
        return self._marked(completion)

    def event(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """Return a chunk of a stream as it may go out, None if all of it waits."""
        began, out = time.perf_counter(), []
        for choice in event.get("choices", ()):
            state = self._choices.get(choice.get("index", 0)) or self._begun(choice)
            if not state.ended:
                self._pass(state, choice, "delta", at_end=bool(choice.get("finish_reason")))
                if _says_something(choice):
                    out.append(choice)
        event["choices"] = out
        self.seconds += time.perf_counter() - began
        if not out and not event.get("usage"):
            return None
        return self._marked(event) if self._ended == self._asked and out else event

    def close(self) -> None:
        """Count what was found in a reply that did not come to its end."""
        for choice in self._choices.values():
            choice.close()

    def _begun(self, choice: Mapping[str, Any]) -> Choice:
        """Return the state of a choice that comes for the first time."""
        state = self._choices[choice.get("index", 0)] = self._new()
        return state

    def _pass(self, state: Choice, choice: dict[str, Any], part: str, *, at_end: bool) -> None:
        state.feed(choice, part)
        if at_end or state.finish_reason:
            self._ended += not state.ended
            state.end(choice, part)
        if "logprobs" in choice or state.ended:
            choice["logprobs"] = state.logprobs()

    def _marked(self, event: dict[str, Any]) -> dict[str, Any]:
        return event | {"guard": self._told.shown()} if self._told.redacted or self._told.blocked else event


def _ended(windows: list[Window], piece: str) -> str:
    """Return the last piece of a text, and what the windows held of it."""
    for window in windows:
        piece = window.feed(piece) + window.end()
    return piece


def _texts(choice: dict[str, Any], inner: dict[str, Any]) -> list[tuple[Key, dict[str, Any]]]:
    """Return the texts of a choice and of its message or delta: their key, and the object with the field of that name."""
    found = [((field, 0), inner) for field in inner if field in FIELDS and isinstance(inner[field], str)]
    if isinstance(choice.get("text"), str):
        found.append((("text", 0), choice))
    for number, call in enumerate(inner.get("tool_calls") or ()):
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), str):
            found.append((("arguments", call.get("index", number)), function))
    return found


def _holder(choice: dict[str, Any], part: str, field: str, number: int) -> dict[str, Any]:
    """Return the object of a choice that a text goes into; made if it is not there."""
    if field == "text":
        return choice
    inner: dict[str, Any] = choice.setdefault(part, {})
    if field != "arguments":
        return inner
    calls = inner.setdefault("tool_calls", [])
    found = next((call for place, call in enumerate(calls) if call.get("index", place) == number), None)
    if found is None:
        calls.append(found := {"index": number, "function": {}})
    function: dict[str, Any] = found["function"]
    return function


def _says_something(choice: Mapping[str, Any]) -> bool:
    """Return True unless a chunk's choice is left with empty texts only."""
    if choice.get("finish_reason") or choice.get("text") or choice.get("logprobs"):
        return True
    delta = choice.get("delta") or {}
    for field in delta:
        if delta[field] or field not in FIELDS:
            return True
    return False
