"""Passages that speak to the model instead of the reader are kept out of prompts; what could end a turn is taken apart.

A document can carry instructions for whoever reads it by machine (indirect prompt injection, Greshake et al. 2023, arXiv
2302.12173). Patterns find the plain forms only: this lowers the risk, it does not end it. A text about such attacks may be
held back too, which the answer tells.
"""

from __future__ import annotations

import re
from functools import lru_cache

_OLD = (
    r"(?:all |any |the |these |those |your |my )*(?:previous|prior|above|earlier|preceding|existing|original|system|initial) "
    r"(?:instructions?|prompts?|rules?|directions?|guidelines?|messages?|commands?|context)"
)
_WHO = r"(?:you|the (?:ai|assistant|model))"
_SECRET = r"(?:system prompt|hidden prompt|your instructions|your prompt|api keys?|passwords?|secrets?)"
_TOLD = r"(?:please )?(?:ignore|do not|don't|you must|always|never|respond|reply|answer|say|write|tell)"
_FORMS = {
    "tells to ignore instructions": rf"\b(?:ignore|disregard|forget|override|bypass)\b {_OLD}",
    "gives new instructions": rf"\b(?:new|updated|real|actual) instructions?(?: are)?(?: for {_WHO})?\s*:",
    "gives the model another role": r"\byou are (?:now|no longer)\b|\bpretend (?:to be|that you)\b",
    "asks for hidden text": rf"\b(?:reveal|print|repeat|output|show|leak|tell)\b.{{0,30}}\b{_SECRET}\b",
    "speaks to the assistant": rf"\b(?:ai|assistant|language model|llm|chatbot)\b\s*[,:]\s*{_TOLD}\b",
    "wants the user kept in the dark": r"\b(?:do not|don't|never) (?:tell|mention|reveal|inform|warn|show)\b.{0,30}\busers?\b",
    "dictates the answer": r"\b(?:respond|reply|answer) (?:only |always |exclusively )+with\b",
    "loads from elsewhere": r"!\[[^\]]*\]\(\s*https?://[^)]*[?&][^)]*=",
}
PATTERNS = {name: re.compile(form, re.IGNORECASE) for name, form in _FORMS.items()}

# The marks with which chat templates begin and end turns; a tokenizer would take them for its own.
_TURN_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\U000e0000-\U000e007f]")


@lru_cache(maxsize=8192)
def reason_to_hold_back(text: str) -> str | None:
    """Return what a passage does that a document should not do, None if nothing is found."""
    plain = " ".join(_INVISIBLE.sub("", text).split())
    return next((name for name, pattern in PATTERNS.items() if pattern.search(plain)), None)


def without_marks(text: str) -> str:
    """Return a text for a prompt: invisible characters are gone, and turn marks are taken apart by a space."""
    return _TURN_MARK.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", _INVISIBLE.sub("", text))
