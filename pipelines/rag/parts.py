"""A question that asks several things at once, as the questions that it is made of.

    Who developed Phi-2 and when was Claude 2 launched?   ->   Who developed Phi-2?   when was Claude 2 launched?

One vector for both lies between the two answers and near neither; so the parts are searched as well. A part begins where a
question word follows "and", "or", a comma, a semicolon or the end of a sentence; "and" alone joins names as often as questions.
"""

from __future__ import annotations

import re

MOST_PARTS, FEWEST_WORDS = 4, 3

_ASKS = r"(?:who|whom|whose|what|when|where|which|why|how)"
_NEXT = rf"(?=(?:(?:in|at|on|by|for|from|to|of)\s+)?{_ASKS}\b)"
_BOUNDARY = re.compile(rf"\?\s+|[.!;,]\s+{_NEXT}|,?\s+(?:and|or)\s+{_NEXT}", re.IGNORECASE)


def parts(question: str) -> list[str]:
    """Return the questions of a question, none if it is one; never more than `MOST_PARTS`."""
    found = [piece.strip(" ?.!;,") for piece in _BOUNDARY.split(question)]
    asked = [f"{piece}?" for piece in found if len(piece.split()) >= FEWEST_WORDS]
    return asked if 1 < len(asked) <= MOST_PARTS else []
