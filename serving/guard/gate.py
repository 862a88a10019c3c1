"""All guards as configured, at the four places where the APIs call them: question, passages, whole reply, stream.

told = Told()
asked = gate.request(asked, told)                  # 400 if an input guard blocks
completion = gate.completion(completion, told)
chunks = gate.stream(chunks, told)                 # a stream that a guard stops ends with finish_reason content_filter
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from monitoring.metrics import GUARD_DURATION
from pipelines.private_forms import Group
from serving.guard.bounds import LengthWindow, RepetitionWindow
from serving.guard.contract import Action, Screen, Stage, Told, Window
from serving.guard.orders import OrderScreen
from serving.guard.private import PrivateScreen, PrivateWindow
from serving.guard.reply import AtEnd, Reply
from serving.problems import ContentFiltered
from serving.settings import GuardConfig

if TYPE_CHECKING:
    from pipelines.rag.index import Hit
    from pipelines.rag.retrieve import Retrieved

GROUPS: tuple[Group, ...] = ("secrets", "personal")
WRITTEN_BY_OTHERS = ("user", "tool", "function")  # turns that orders are looked for in; the application's own may give some
Screens = Sequence[tuple[Screen, Action]]


class Gate:
    """The guards that are on.

    Args:
        config: what each does at each stage.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        private = {group: PrivateScreen(group) for group in GROUPS}
        self._input = _on((private[group], getattr(config, group).input) for group in GROUPS)
        self._orders = _on([(OrderScreen(), config.injection.input)])
        self._chunks = _on((private[group], getattr(config, group).chunks) for group in GROUPS)

    def question(self, text: str, told: Told) -> str:
        """Return a question as it may go on.

        Raises:
            ContentFiltered: a guard blocks it.
        """
        with GUARD_DURATION.labels(stage="input").time():
            return _looked_at(text, "input", [*self._input, *self._orders], told)

    def request(self, body: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Return a request of OpenAI's API with its texts (`messages`, `prompt`) as they may go on.

        Raises:
            ContentFiltered: a guard blocks it.
        """
        with GUARD_DURATION.labels(stage="input").time():
            texts: dict[str, Any] = {}
            if isinstance(body.get("messages"), list):
                texts["messages"] = [self._turn(turn, told) for turn in body["messages"]]
            if "prompt" in body:
                texts["prompt"] = _content(body["prompt"], [*self._input, *self._orders], told)
            return {**body, **texts}

    def passages(self, found: Retrieved, told: Told) -> Retrieved:
        """Return what was retrieved as it may go into a prompt; a passage that is blocked is held back with the reason."""
        with GUARD_DURATION.labels(stage="chunk").time():
            told.decide("injection", "chunk", "block", [reason for _, reason in found.held_back])
            hits, held_back = [], list(found.held_back)
            for hit in found.hits if self._chunks else ():
                try:
                    hits.append(self._passage(hit, told))
                except ContentFiltered as problem:
                    held_back.append((hit, problem.came))
            return replace(found, hits=tuple(hits) if self._chunks else found.hits, held_back=tuple(held_back))

    def completion(self, completion: dict[str, Any], told: Told) -> dict[str, Any]:
        """Return a reply in one piece as it may go out."""
        with GUARD_DURATION.labels(stage="output").time():
            return Reply(self.windows, told, len(completion.get("choices", ()))).whole(completion)

    async def stream(
        self, chunks: AsyncIterator[dict[str, Any]], told: Told, choices: int = 1
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a reply as they may go out; closes `chunks` when nothing more of them may."""
        reply = Reply(self.windows, told, choices)
        try:
            async with aclosing(cast(AsyncGenerator[dict[str, Any], None], chunks)):
                async for chunk in chunks:
                    if (out := reply.event(chunk)) is not None:
                        yield out
                    if reply.over:
                        return
        finally:
            reply.close()
            GUARD_DURATION.labels(stage="output").observe(reply.seconds)

    def _turn(self, turn: Any, told: Told) -> Any:
        if not isinstance(turn, dict) or not turn.get("content"):
            return turn
        screens = [*self._input, *(self._orders if turn.get("role") in WRITTEN_BY_OTHERS else ())]
        return turn | {"content": _content(turn["content"], screens, told)}

    def _passage(self, hit: Hit, told: Told) -> Hit:
        title, text = (_looked_at(one, "chunk", self._chunks, told) for one in (hit.title, hit.text))
        return replace(hit, title=title, text=text)

    def windows(self) -> list[Window]:
        """Return new windows for one text, in the order in which it goes through them."""
        length, repetition = self._config.length, self._config.repetition
        windows: list[Window] = []
        if length.output != "off":
            windows.append(LengthWindow(length.output, length.max_chars))
        if repetition.output != "off":
            windows.append(RepetitionWindow(repetition.output, repetition.words, repetition.times))
        private = ((group, getattr(self._config, group).output) for group in GROUPS)
        windows += [PrivateWindow(group, action) for group, action in private if action != "off"]
        return [AtEnd(window) if window.action == "report" else window for window in windows]


def _on(screens: Any) -> Screens:
    return [(screen, action) for screen, action in screens if action != "off"]


def _content(content: Any, screens: Screens, told: Told) -> Any:
    """Return the content of a turn, or a prompt: a text, or a list of texts and parts with texts."""
    if isinstance(content, str):
        return _looked_at(content, "input", screens, told)
    if isinstance(content, list):
        return [_content(one, screens, told) for one in content]
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        return content | {"text": _looked_at(content["text"], "input", screens, told)}
    return content


def _looked_at(text: str, stage: Stage, screens: Screens, told: Told) -> str:
    for screen, action in screens:
        if kinds := screen.find(text):
            told.decide(screen.name, stage, action, kinds)
            if action == "block":
                what = ", ".join(dict.fromkeys(kinds))
                raise ContentFiltered(f"the guard {screen.name!r} blocks this {stage}: {what}", "a text without it")
            text = screen.redacted(text) if action == "redact" else text
    return text
