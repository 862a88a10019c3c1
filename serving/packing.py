"""How many passages fit into a prompt: the best ones, as many as a number of tokens allows, counted by the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.rag.answer import messages

if TYPE_CHECKING:
    from pipelines.rag.index import Hit
    from serving.engines.contract import Chat
    from serving.upstream import Upstream

TEMPLATE_BYTES = 256  # more than any chat template adds to two turns


@dataclass(frozen=True)
class Packed:
    """A prompt and what is in it.

    Attributes:
        messages: with the passages, numbered in the order of `hits`.
        hits: that fit, best first.
        left_out: the rest.
    """

    messages: Chat
    hits: tuple[Hit, ...]
    left_out: tuple[Hit, ...]


async def fitting(question: str, hits: Sequence[Hit], upstream: Upstream, max_tokens: int) -> Packed:
    """Return the prompt with as many of the best passages as fit, and at least one.

    Args:
        question: what is asked.
        hits: passages, best first.
        upstream: counts tokens; a prompt that has no more bytes than `max_tokens` is not counted, since a token has one at least.
        max_tokens: of the whole prompt.

    Raises:
        EngineError: the engine does not run, or does not answer.
    """
    upstream.check_up()
    count = len(hits)
    chat = messages(question, hits[:count])
    while count > 1 and _bytes(chat) > max_tokens:
        tokens = await upstream.token_count(chat)
        if tokens <= max_tokens:
            break
        count = max(1, min(count - 1, count * max_tokens // tokens))
        chat = messages(question, hits[:count])
    return Packed(chat, tuple(hits[:count]), tuple(hits[count:]))


def _bytes(chat: Chat) -> int:
    return TEMPLATE_BYTES + sum(len(turn["content"].encode()) for turn in chat)
