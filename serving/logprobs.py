"""Log-probabilities of tokens in the two forms of OpenAI's API: that of chats, and the older one of text completions.

Engines give at least one alternative to each token, llama.cpp 20 unless told; a request that asks for none gets none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from serving.choices import Shape


def as_they_are(choice: dict[str, Any]) -> dict[str, Any]:
    """Change nothing."""
    return choice


def of_chats(alternatives: int) -> Shape:
    """Return what leaves each token so many alternatives."""

    def shape(choice: dict[str, Any]) -> dict[str, Any]:
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens is None:
            return choice
        short = [token | {"top_logprobs": token["top_logprobs"][:alternatives]} for token in tokens]
        return choice | {"logprobs": choice["logprobs"] | {"content": short}}

    return shape


def of_texts(alternatives: int) -> Shape:
    """Return what gives the choices of one completion the older form; offsets go on from chunk to chunk."""
    read: defaultdict[int, int] = defaultdict(int)

    def shape(choice: dict[str, Any]) -> dict[str, Any]:
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens is None:
            return choice
        offsets = []
        for token in tokens:
            offsets.append(read[choice["index"]])
            read[choice["index"]] += len(token["token"])
        return choice | {"logprobs": {
            "tokens": [token["token"] for token in tokens], "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [_best(token, alternatives) for token in tokens], "text_offset": offsets,
        }}  # fmt: skip

    return shape


def _best(token: Mapping[str, Any], alternatives: int) -> dict[str, float]:
    """Return so many alternatives, and the token that was chosen as well, as OpenAI's API does."""
    best = {each["token"]: each["logprob"] for each in token["top_logprobs"][:alternatives]}
    return best | {token["token"]: token["logprob"]} if alternatives else best
