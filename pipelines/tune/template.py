"""The template lock: what the chat template made of a few golden chats when the model was trained.

An engine renders chats with its own copy of the template. Evaluation and serving compare that copy with the lock and refuse
on a mismatch, since a model that is asked in another format than it was taught answers worse without any error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.errors import FingerprintMismatch
from pipelines.rag.answer import Passage, messages

LOCK_FILE = "template_lock.json"
Render = Callable[[list[dict[str, str]]], list[int]]


def golden_chats() -> list[list[dict[str, str]]]:
    """Return chats that touch what templates get wrong: system turn, several turns, line ends, other alphabets."""
    return [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two\n\nlines, naïve café, 東京, 🙂"}],
        [{"role": "user", "content": "One"}, {"role": "assistant", "content": "1 [1]"}, {"role": "user", "content": " Two "}],
        messages("Who made it?", _GOLDEN_PASSAGES),
    ]


def render_with(tokenizer: Any) -> Render:
    """Return a function that renders a chat with a transformers tokenizer, up to where the reply begins."""

    def render(chat: list[dict[str, str]]) -> list[int]:
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    return render


def lock(tokenizer: Any) -> dict[str, Any]:
    """Return the lock of a tokenizer: template hash, special token ids, and the token ids of the golden chats."""
    render = render_with(tokenizer)
    return {
        "template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "special_tokens": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
        "golden": [{"messages": chat, "token_ids": render(chat)} for chat in _accepted(render)],
    }


def check(locked: Mapping[str, Any], render: Render, where: str) -> None:
    """Render the golden chats again and compare.

    Raises:
        FingerprintMismatch: `where` renders a chat to other tokens than training did.
    """
    for number, golden in enumerate(locked["golden"]):
        now = render(golden["messages"])
        if now != golden["token_ids"]:
            place = next((i for i, (a, b) in enumerate(zip(now, golden["token_ids"], strict=False)) if a != b), "the end")
            raise FingerprintMismatch(f"{where} renders golden chat {number} differently from token {place} on",
                                      "the chat template that the adapter was trained with",
                                      "make finetune, or serve the base that the adapter was made for")  # fmt: skip


class _Golden:
    def __init__(self, title: str, text: str) -> None:
        self.title, self.text = title, text


_GOLDEN_PASSAGES: tuple[Passage, ...] = (_Golden("Vela > Origin", "Vela was made by Orion."), _Golden("Kite", "Kite flies."))


def _accepted(render: Render) -> list[list[dict[str, str]]]:
    """Return the golden chats that the template takes; some families have no system turn and say so with an error."""
    from jinja2 import TemplateError

    taken = []
    for chat in golden_chats():
        try:
            render(chat)
        except TemplateError:
            continue
        taken.append(chat)
    return taken
