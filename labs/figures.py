"""The figures in the catalogue's statements, as numbers: tokens, dollars, accuracy, latency, throughput.

A statement is read as it stands; where the maker says something else than the document, `maker` decides for what a model can
do (context, parameters), and the document for its table of prices and performance, which nobody else states.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipelines.catalogue import Model
from pipelines.errors import ConfigError

UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
BITS_OF_FOUR = 4.5  # a Q4_K weight with its scales
INPUT_PER_OUTPUT = 3  # tokens read for each that is written, in a blended price
CONTEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([KM]?)(?:\s*tokens|\b)", re.I)
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(G|GB|M|MB)?", re.I)


@dataclass(frozen=True)
class Row:
    """What the document's table of performance says of a model.

    Attributes:
        cost: dollars for a million tokens, three read for each one written.
        accuracy: from 0 to 1.
        latency: the document's index, which has no unit.
        throughput: tokens per second.
    """

    name: str
    cost: float
    accuracy: float
    latency: float
    throughput: float


def context_of(model: Model) -> int | None:
    """Return the longest text in tokens: what the model was made for, or else the largest number that is stated."""
    if model.context_tokens:
        return model.context_tokens
    fact = model.facts.get("context_window")
    found = CONTEXT.findall((fact.maker or fact.document or "") if fact else "")
    return max((round(float(number) * UNITS[unit.upper()]) for number, unit in found), default=None)


def four_bit_bytes(model: Model) -> int | None:
    """Return the size of the weights in 4 bits, from the published number of parameters; None for a closed model."""
    return round(model.weights.parameters_billions * 1e9 * BITS_OF_FOUR / 8) if model.weights else None


def cost_of(model: Model) -> float | None:
    """Return the blended price of a million tokens in dollars, None where the document gives none."""
    both = number_of(model, "input_price"), number_of(model, "output_price")
    return None if None in both else (INPUT_PER_OUTPUT * both[0] + both[1]) / (INPUT_PER_OUTPUT + 1)  # type: ignore[operator]


def number_of(model: Model, key: str) -> float | None:
    """Return the first number in the document's statement, or None."""
    fact = model.facts.get(key)
    found = re.search(r"\d+(?:\.\d+)?", (fact.document or "") if fact else "")
    return float(found[0]) if found else None


def table_of(models: list[Model]) -> list[Row]:
    """Return the rows of the document's table of performance."""
    rows = []
    for model in models:
        cost, *others = cost_of(model), *(number_of(model, key) for key in ("accuracy", "latency", "throughput"))
        if cost is not None and all(value is not None for value in others):
            rows.append(Row(model.name, cost, *others))  # type: ignore[arg-type]
    return rows


def front(rows: list[Row]) -> list[Row]:
    """Return the Pareto front: rows that no other beats in one of cost, accuracy and latency without losing in another."""

    def merits(row: Row) -> tuple[float, float, float]:
        return -row.cost, row.accuracy, -row.latency

    def beaten(row: Row) -> bool:
        return any(merits(o) != merits(row) and all(a >= b for a, b in zip(merits(o), merits(row), strict=True)) for o in rows)

    return [row for row in rows if not beaten(row)]


def tokens(text: str) -> int:
    """Read a length such as 32k, 128K or 4096; `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"{text!r} is no number of tokens", "a number such as 4096, 32k or 1M", "--context 32k")
    return round(float(found[1]) * UNITS[found[2].upper()])


def size_bytes(text: str) -> int:
    """Read a size such as 24GB or 800MB; a number alone is gigabytes; `ConfigError` for anything else."""
    found = MEMORY.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"{text!r} is no size", "a size such as 24GB or 800MB", "--max-memory 24GB")
    return round(float(found[1]) * (1e6 if (found[2] or "G").upper().startswith("M") else 1e9))
