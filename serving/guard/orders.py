"""The guard `injection`: questions that give the model orders, told by the patterns that also keep such passages out of prompts.

A user may well say "answer only with yes", so this guard reports unless it is told to block.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.rag.screen import order_in


class OrderScreen:
    """Finds the first order in a text."""

    name = "injection"

    def find(self, text: str) -> Sequence[str]:
        """Return what the text does, at most one thing."""
        order = order_in(text)
        return [order] if order else []

    def redacted(self, text: str) -> str:
        """Return the text as it is: an order cannot be cut out of it."""
        return text
