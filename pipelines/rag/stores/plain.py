"""Filters in a form that every store can be told: no `not`, no value of another kind, only whole numbers.

What an absent field or a value of another kind means (pipelines.rag.where) is decided here, once, and not left to each
store's idea of null: `not page > 3` becomes `page absent or page <= 3`, `page < 3.5` becomes `page < 4`, and `page = "3"`
becomes what no chunk matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from pipelines.rag.chunk import Chunk
from pipelines.rag.where import FIELDS, All, Any, Comparison, Expression, Not, Record, Scalar

LARGEST = 2**53  # numbers of chunks are smaller, so that every store holds them exactly
OPPOSITE = {"in": "not in", "<": ">=", "<=": ">", "like": "unlike", "contains": "lacks", "present": "absent"}
OPPOSITE |= {opposite: operator for operator, opposite in OPPOSITE.items()}
EVERYTHING, NOTHING = All(()), Any(())

_TYPES = {field.name: str(field.type) for field in fields(Chunk)}
NUMBERS = frozenset(field for field in FIELDS if _TYPES.get(field, "").startswith("int"))
MAY_BE_ABSENT = frozenset(field for field in FIELDS if "None" in _TYPES.get(field, "None"))

Native = TypeVar("Native")


class CannotSay(Exception):
    """A store has no filter for a part of an expression."""


@dataclass(frozen=True)
class Leaf(Expression):
    """A field that is there and compares so, or that is absent.

    Attributes:
        operator: in, not in, <, <=, >, >=, like, unlike, contains, lacks, present, absent.
        values: of the field's kind; one, unless the operator is in or not in, or none for present and absent.
    """

    field: str
    operator: str
    values: tuple[Scalar, ...] = ()

    def matches(self, record: Record) -> bool:
        """Return whether a chunk with these fields matches."""
        held = record.get(self.field)
        if held is None or self.operator in ("present", "absent"):
            return (held is None) == (self.operator == "absent")
        if self.operator in ("not in", "unlike", "lacks"):
            return not Leaf(self.field, OPPOSITE[self.operator], self.values).matches(record)
        return Comparison(self.field, "=" if self.operator == "in" else self.operator, self.values).matches(record)


def plain(expression: Expression, holds: bool = True) -> Expression:
    """Return `All`, `Any` and `Leaf` that match the same chunks, or those that do not match; see the module.

    `EVERYTHING` and `NOTHING` come only as the whole, never as a part.
    """
    if isinstance(expression, Not):
        return plain(expression.part, not holds)
    if isinstance(expression, All | Any):
        return _joined(isinstance(expression, All) == holds, [plain(part, holds) for part in expression.parts])
    assert isinstance(expression, Comparison)
    found = _positive(expression)
    return found if holds else _opposite(found, expression.field)


def told(expression: Expression, leaf: Callable[[Leaf], Native], every: Callable[[list[Native]], Native],
         some: Callable[[list[Native]], Native]) -> Native:  # fmt: skip
    """Return a plain expression in a store's own form.

    Args:
        expression: from `plain`, neither `EVERYTHING` nor `NOTHING`.
        leaf: says a leaf; raises `CannotSay` if the store has nothing for it.
        every: joins parts with "and".
        some: joins parts with "or".
    """
    if isinstance(expression, Leaf):
        return leaf(expression)
    assert isinstance(expression, All | Any)
    return (every if isinstance(expression, All) else some)([told(part, leaf, every, some) for part in expression.parts])


def _positive(comparison: Comparison) -> Expression:
    field, operator = comparison.field, comparison.operator
    leaves = [_one(field, operator, value) for value in comparison.values]
    same = tuple(value for leaf in leaves if isinstance(leaf, Leaf) and leaf.operator == "in" for value in leaf.values)
    others = [leaf for leaf in leaves if not (isinstance(leaf, Leaf) and leaf.operator == "in")]
    return _joined(False, [*([Leaf(field, "in", same)] if same else []), *others])


def _one(field: str, operator: str, value: Scalar) -> Expression:
    there: Expression = Leaf(field, "present") if field in MAY_BE_ABSENT else EVERYTHING
    if isinstance(value, bool) or isinstance(value, str) == (field in NUMBERS):
        return there if operator == "!=" else NOTHING
    if isinstance(value, str):
        return Leaf(field, {"=": "in", "!=": "not in"}.get(operator, operator), (value,))
    whole = isinstance(value, int) or value.is_integer()
    if operator in ("=", "!="):
        if not whole or abs(value) > LARGEST:
            return NOTHING if operator == "=" else there
        return Leaf(field, "in" if operator == "=" else "not in", (int(value),))
    if operator not in ("<", "<=", ">", ">="):
        return NOTHING
    if abs(value) > LARGEST:
        return there if (value > 0) == (operator in ("<", "<=")) else NOTHING
    if not whole:  # 3.5: < and <= begin below 4, > and >= above 3
        return Leaf(field, "<", (math.ceil(value),)) if operator in ("<", "<=") else Leaf(field, ">", (math.floor(value),))
    return Leaf(field, operator, (int(value),))


def _opposite(found: Expression, field: str) -> Expression:
    if isinstance(found, Leaf):
        other = Leaf(field, OPPOSITE[found.operator], found.values)
        absent = [Leaf(field, "absent")] if field in MAY_BE_ABSENT and other.operator != "absent" else []
        return _joined(False, [*absent, other])
    assert isinstance(found, All | Any)
    return _joined(isinstance(found, Any), [_opposite(part, field) for part in found.parts])


def _joined(every: bool, parts: Sequence[Expression]) -> Expression:
    """Return the parts as `All` or `Any`, without those that decide nothing and without layers of one kind."""
    kind, decides, idle = (All, NOTHING, EVERYTHING) if every else (Any, EVERYTHING, NOTHING)
    if decides in parts:
        return decides
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if isinstance(part, kind) else () if part == idle else (part,)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))
