"""A family's tokenizer and its chat template, with what families do differently made alike.

Some have no system turn: their template refuses one, or leaves it out without a word. Then its text stands at the head of the
first question, as the makers advise. Some end a turn with another token than a text; that one is read off the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.catalogue import Model
from pipelines.errors import TrainingFailed

MARK = "\u2045mark\u2046"  # stands for a text whose place in a rendered chat is wanted

Turn = Mapping[str, str]


def load_tokenizer(folder: Path, entry: Model) -> Any:
    """Return the tokenizer of a model's files; the catalogue's template and a token to pad with where they bring none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = entry.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokens_of(tokenizer: Any, messages: Sequence[Turn], *, reply_follows: bool) -> list[int]:
    """Return a chat as token ids; `reply_follows` adds what stands before a reply."""
    told = list(messages) if has_system_turn(tokenizer) else folded(messages)
    return list(tokenizer.apply_chat_template(told, add_generation_prompt=reply_follows, return_dict=True)["input_ids"])


def folded(messages: Sequence[Turn]) -> list[Turn]:
    """Return a chat without a system turn: its text is at the head of the first question."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


@lru_cache(maxsize=8)
def has_system_turn(tokenizer: Any) -> bool:
    """Return False if the template refuses a system turn or leaves its text out."""
    from jinja2 import TemplateError

    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "system", "content": MARK}, {"role": "user", "content": "Hello"}], tokenize=False
        )
    except TemplateError:
        return False
    return MARK in shown


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: Any) -> int:
    """Return the token that ends a reply: the first special one that the template puts behind it.

    Raises:
        TrainingFailed: there is none, so a model would never learn to stop.
    """
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(MARK)[2]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [number for number in tokenizer(behind, add_special_tokens=False)["input_ids"] if number in special]
    if not ends:
        raise TrainingFailed("the chat template puts no end-of-turn token after the reply: the model would never learn to stop",
                             f"a special token behind it, such as {tokenizer.eos_token}",
                             "edit chat_template in the model's file")  # fmt: skip
    return int(ends[0])
