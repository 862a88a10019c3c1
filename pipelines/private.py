"""Secrets and personal data in a text, told by their form and, where they have one, their check digits.

One detector for everything: the report on rows (pipelines.tune.report) and the guards of the gateway (serving.guard) use it.
It knows forms (pipelines.private_forms), not meanings: a name or a street is not found, nor a key whose maker gives it no form:

    llmlab data report faq.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from pipelines.private_forms import KINDS, Found, Group, Kind


def spans(text: str, kinds: Sequence[Kind], start: int = 0, stop: int | None = None) -> Iterator[Found]:
    """Yield what is found, in order and without overlaps: the leftmost first, of two at one place the kind that is named first.

    Args:
        text: what is searched.
        kinds: what for.
        start: of the search; what stands before it is only looked back at.
        stop: no match that begins here or later is yielded; None for the end of the text.
    """
    stop = len(text) if stop is None else stop
    following = [kind.search(text, start) for kind in kinds]
    while True:
        best = min((one for one in following if one), key=lambda one: one.start, default=None)
        if best is None or best.start >= stop:
            return
        yield best
        following = [kind.search(text, best.end) if one and one.start < best.end else one
                     for kind, one in zip(kinds, following, strict=True)]  # fmt: skip


def redacted(text: str, kinds: Sequence[Kind]) -> tuple[str, list[str]]:
    """Return a text with all that is found replaced by what it was, and the kinds of that in order."""
    pieces, at, names = [], 0, []
    for found in spans(text, kinds):
        pieces += [text[at : found.start], in_place_of(found.kind)]
        at = found.end
        names.append(found.kind)
    return "".join([*pieces, text[at:]]), names


def in_place_of(kind: str) -> str:
    """Return what is shown instead of something private."""
    return f"[{kind} redacted]"


def kinds_of(group: Group) -> tuple[Kind, ...]:
    """Return the kinds of a group."""
    return tuple(kind for kind in KINDS if kind.group == group)


@cache
def begins_of(group: Group) -> re.Pattern[str]:
    """Return a pattern of the places where something of a group may begin, also if the text ends there."""
    firsts = [kind.first for kind in kinds_of(group)]
    return re.compile("|".join(f"(?{'a' if first.flags & re.ASCII else ''}:{first.pattern})" for first in firsts))
