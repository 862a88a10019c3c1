"""Passages that speak to the model instead of the reader are kept out of prompts; what could end a turn is taken apart.

A document can carry instructions for whoever reads it by machine (indirect prompt injection, Greshake et al. 2023, arXiv
2302.12173). Patterns find the plain forms only: this lowers the risk, it does not end it. A text about such attacks may be
held back too, which the answer tells.
"""

from __future__ import annotations

import re
from functools import lru_cache


def _word(*forms: str) -> str:
    """Return a pattern of words; it looks back behind the first letter, since such a pattern is searched for faster than one
    that begins with a boundary.
    """
    return "(?:" + "|".join(rf"{form[0]}(?<!\w{form[0]}){form[1:]}" for form in forms) + ")"


_OLD = (
    r"(?:all |any |the |these |those |your |my )*(?:previous|prior|above|earlier|preceding|existing|original|system|initial) "
    r"(?:instructions?|prompts?|rules?|directions?|guidelines?|messages?|commands?|context)"
)
_WHO = r"(?:you|the (?:ai|assistant|model))"
_SECRET = r"(?:system prompt|hidden prompt|your instructions|your prompt|api keys?|passwords?|secrets?)"
_TOLD = r"(?:please )?(?:ignore|do not|don't|you must|always|never|respond|reply|answer|say|write|tell)"
_FORMS = {  # each with words, one of which it needs: most texts have none, and to look for words is fast
    "tells to ignore instructions": (_word("ignore", "disregard", "forget", "override", "bypass") + rf"\b {_OLD}",
                                     ("ignore ", "disregard ", "forget ", "override ", "bypass ")),
    "gives new instructions": (_word("new", "updated", "real", "actual") + rf" instructions?(?: are)?(?: for {_WHO})?\s*:",
                               (" instruction",)),
    "gives the model another role": (_word(r"you are (?:now|no longer)\b", r"pretend (?:to be|that you)\b"),
                                     ("you are no", "pretend t")),
    "asks for hidden text": (_word("reveal", "print", "repeat", "output", "show", "leak", "tell") + rf"\b.{{0,30}}\b{_SECRET}\b",
                             ("prompt", "your instructions", "api key", "password", "secret")),
    "speaks to the assistant": (_word("ai", "assistant", "language model", "llm", "chatbot") + rf"\b\s*[,:]\s*{_TOLD}\b",
                                (",", ":")),
    "wants the user kept in the dark": (
        _word("do not", "don't", "never") + r" (?:tell|mention|reveal|inform|warn|show)\b.{0,30}\busers?\b", ("user",)),
    "dictates the answer": (_word("respond", "reply", "answer") + r" (?:only |always |exclusively )+with\b",
                            ("only with", "always with", "exclusively with")),
    "loads from elsewhere": (r"!\[[^\]]{0,200}\]\(\s?https?://[^)?&]{0,500}[?&][^)=]{0,500}=", ("![",)),
}  # fmt: skip
PATTERNS = {name: re.compile(form) for name, (form, _) in _FORMS.items()}

# The marks with which chat templates begin and end turns; a tokenizer would take them for its own.
_TURN_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\U000e0000-\U000e007f]")


def order_in(text: str) -> str | None:
    """Return what a text does that no document should do, and no question need do; None if nothing is found."""
    plain = " ".join(_INVISIBLE.sub("", text).lower().split())
    likely = (name for name, (_, words) in _FORMS.items() if any(word in plain for word in words))
    return next((name for name in likely if PATTERNS[name].search(plain)), None)


@lru_cache(maxsize=8192)
def reason_to_hold_back(passage: str) -> str | None:
    """Return `order_in` of a passage, which is remembered: the same passages come again."""
    return order_in(passage)


def without_marks(text: str) -> str:
    """Return a text for a prompt: invisible characters are gone, and turn marks are taken apart by a space."""
    return _TURN_MARK.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", _INVISIBLE.sub("", text))
