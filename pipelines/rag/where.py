"""Which chunks are searched: expressions over their fields, such as `source like "api/*" and page >= 3`.

    expression   and, or, not, parentheses
    comparison   field = value, also != < <= > >=; field in (value, ...); field like "pattern" (* and ?); field contains "text"
    value        "text", 'text', 12, 1.5, true, false
    field        source, title, text, page, kind, id

A file's kind is markdown, text, html, pdf, docx, table, records, code or image. Capitals matter in texts. A comparison with a
field that a chunk does not have, or of a text with a number, is false, and its `not` is true.
Used by: llmlab ask "..." --where 'source = "falcon.md"'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from pipelines.errors import DataError

Scalar = str | int | float | bool
Record = Mapping[str, Scalar | None]

FIELDS = ("source", "title", "text", "page", "kind", "id")
MAX_LENGTH, MAX_DEPTH = 1000, 20
EXAMPLE = """source like "api/*" and page >= 3"""

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<number>-?\d+(?:\.\d+)?)(?![\w.])"""
    r"""|(?P<operator><=|>=|!=|=|<|>)|(?P<mark>[(),])|(?P<word>[A-Za-z_][\w.]*))"""
)


class Expression:
    """What a chunk either matches or not."""

    def matches(self, record: Record) -> bool:
        """Return whether a chunk with these fields matches."""
        raise NotImplementedError


@dataclass(frozen=True)
class Comparison(Expression):
    """A field beside a value, or beside several for "in"."""

    field: str
    operator: str
    values: tuple[Scalar, ...]

    def matches(self, record: Record) -> bool:
        """Return whether the field holds; see the module for absent fields and other kinds."""
        held = record.get(self.field)
        return held is not None and any(_compare(held, self.operator, value) for value in self.values)


@dataclass(frozen=True)
class All(Expression):
    """Every part matches."""

    parts: tuple[Expression, ...]

    def matches(self, record: Record) -> bool:
        """Return whether all parts match."""
        return all(part.matches(record) for part in self.parts)


@dataclass(frozen=True)
class Any(Expression):
    """At least one part matches."""

    parts: tuple[Expression, ...]

    def matches(self, record: Record) -> bool:
        """Return whether any part matches."""
        return any(part.matches(record) for part in self.parts)


@dataclass(frozen=True)
class Not(Expression):
    """The part does not match."""

    part: Expression

    def matches(self, record: Record) -> bool:
        """Return whether the part does not match."""
        return not self.part.matches(record)


def record_of(chunk: object) -> dict[str, Scalar | None]:
    """Return the fields of a chunk that an expression can name."""
    return {field: getattr(chunk, field) for field in FIELDS}


class _Token(NamedTuple):
    kind: str
    text: str
    at: int


def parse(text: str) -> Expression:
    """Read an expression.

    Raises:
        DataError: it is too long or nested too deeply, or something else was expected; tells where.
    """
    if len(text) > MAX_LENGTH:
        raise DataError(f"the expression has {len(text)} characters", f"at most {MAX_LENGTH}")
    parser = _Parser(text)
    found = parser.any_of(0)
    parser.expect("end")
    return found


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [*self._tokens(), _Token("end", "", len(text))]
        self.place = 0

    def any_of(self, depth: int) -> Expression:
        parts = [self.all_of(depth)]
        while self.takes("or"):
            parts.append(self.all_of(depth))
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def all_of(self, depth: int) -> Expression:
        parts = [self.one(depth)]
        while self.takes("and"):
            parts.append(self.one(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def one(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise self.problem(f"at most {MAX_DEPTH} parts inside each other")
        if self.takes("not"):
            return Not(self.one(depth + 1))
        if self.takes("("):
            inner = self.any_of(depth + 1)
            self.expect(")")
            return inner
        return self.comparison()

    def comparison(self) -> Expression:
        field = self.next
        if field.kind != "word" or field.text not in FIELDS:
            raise self.problem(f"a field: {', '.join(FIELDS)}")
        self.place += 1
        operator = self.next
        if operator.kind != "operator" and operator.text not in ("in", "like", "contains"):
            raise self.problem("= != < <= > >=, in, like or contains")
        self.place += 1
        if operator.text != "in":
            value = self.value()
            if operator.text in ("like", "contains") and not isinstance(value, str):
                self.place -= 1
                raise self.problem("a text in quotes")
            return Comparison(field.text, operator.text, (value,))
        self.expect("(")
        values = [self.value()]
        while self.takes(","):
            values.append(self.value())
        self.expect(")")
        return Comparison(field.text, "=", tuple(values))

    def value(self) -> Scalar:
        token = self.next
        self.place += 1
        if token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        if token.kind == "number":
            return float(token.text) if "." in token.text else int(token.text)
        if token.text in ("true", "false"):
            return token.text == "true"
        self.place -= 1
        raise self.problem("a text in quotes, a number, true or false")

    @property
    def next(self) -> _Token:
        return self.tokens[self.place]

    def takes(self, text: str) -> bool:
        if self.next.kind not in ("word", "mark") or self.next.text != text:
            return False
        self.place += 1
        return True

    def expect(self, what: str) -> None:
        if what == self.next.kind == "end" or self.takes(what):
            return
        raise self.problem("and, or, or the end" if what == "end" else what)

    def problem(self, expected: str) -> DataError:
        came = f"{self.next.text!r} at character {self.next.at + 1}" if self.next.kind != "end" else "the end"
        return DataError(f"the expression {self.text!r} has {came}", expected, f"an expression such as {EXAMPLE}")

    def _tokens(self) -> Iterator[_Token]:
        at = 0
        while self.text[at:].strip():
            found = _TOKEN.match(self.text, at)
            if not found:
                rest = len(self.text[at:]) - len(self.text[at:].lstrip())
                raise DataError(f"the expression {self.text!r} cannot be read from character {at + rest + 1}",
                                "fields, values and operators", f"an expression such as {EXAMPLE}")  # fmt: skip
            kind = found.lastgroup or ""
            yield _Token(kind, found[kind], found.start(kind))
            at = found.end()


def _compare(held: Scalar, operator: str, value: Scalar) -> bool:
    alike = _kind(held) == _kind(value)
    if operator == "!=":
        return not alike or held != value
    if not alike:
        return False
    if operator == "=":
        return held == value
    if isinstance(held, str) and isinstance(value, str):
        if operator == "like":
            return fnmatchcase(held, value.replace("[", "[[]"))
        if operator == "contains":
            return value in held
        return _ordered(held, operator, value)
    return not isinstance(held, bool) and _ordered(held, operator, value)


def _ordered(held: str | float, operator: str, value: str | float) -> bool:
    below, same = held < value, held == value  # type: ignore[operator]
    return {"<": below, "<=": below or same, ">": not below and not same, ">=": not below}[operator]


def _kind(value: Scalar) -> type:
    return str if isinstance(value, str) else bool if isinstance(value, bool) else float
