"""What a token of a model costs: what the configuration says, else what the catalogue knows; nothing is made up.

llmlab serve gpt-4o --engine provider
llmlab serve --set prices.prompt=0.05 --set prices.reply=0.20     # what your own machine costs you
"""

from __future__ import annotations

import re
from typing import NamedTuple

from monitoring.metrics import COST
from pipelines.catalogue import Model
from serving.settings import Prices

MILLION = 1_000_000
_STATED = re.compile(r"\$\s?(\d+(?:\.\d+)?) (?:per|/) (?:million|1M|M) tokens")


class Price(NamedTuple):
    """Dollars for a million tokens; None where nobody says it."""

    prompt: float | None
    reply: float | None

    def charge(self, model: str, prompt_tokens: int, reply_tokens: int) -> None:
        """Add what a generation cost to the metrics, as far as there is a price."""
        for kind, dollars, tokens in (("prompt", self.prompt, prompt_tokens), ("reply", self.reply, reply_tokens)):
            if dollars is not None:
                COST.labels(model=model, kind=kind).inc(dollars * tokens / MILLION)


UNKNOWN = Price(None, None)


def price_of(model: Model, given: Prices) -> Price:
    """Return the price of a model's tokens; adapters cost what their base does."""
    prompt = given.prompt if given.prompt is not None else _stated(model, "input_price")
    reply = given.reply if given.reply is not None else _stated(model, "output_price")
    return Price(prompt, reply)


def _stated(model: Model, key: str) -> float | None:
    """Read a price like "$2.50 per million tokens" from the catalogue; the maker's word counts before the document's."""
    fact = model.facts.get(key)
    for statement in (fact.maker, fact.document) if fact else ():
        if statement and (found := _STATED.search(statement)):
            return float(found[1])
    return None
