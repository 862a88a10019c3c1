"""Tables and records: a section for each row of a CSV or TSV file, and for each record of a JSON or JSONL file.

A row is text of `column: value` lines, so what belongs together stays together; nested keys are joined by dots. The number
of a row is not part of its section, so a row that is inserted leaves the others what they were.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pipelines.rag.readers.section import Read, Section, Unreadable, check_size, one_line, text_of

MAX_BYTES = 20_000_000
MAX_ROWS = 100_000  # of a file
MAX_COLUMNS = 1_000
MAX_DEPTH = 20  # of JSON inside JSON

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_ROWS = 20
_NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?")
_YEAR = re.compile(r"(?:19|20)\d\d")
_TEXT_KEYS, _TITLE_KEYS = ("text", "content"), ("title", "name")


def comma_separated(content: bytes, stem: str) -> Read:
    """Read CSV, whatever separates its columns; see `tab_separated`."""
    check_size(content, MAX_BYTES)
    text = text_of(content)
    return _table(text, _delimiter(text), stem)


def tab_separated(content: bytes, stem: str) -> Read:
    """Read TSV; the first row names the columns unless there are numbers in it (but years may name columns)."""
    check_size(content, MAX_BYTES)
    return _table(text_of(content), "\t", stem)


def records(content: bytes, stem: str) -> Read:
    """Read JSON: the records of a list, or of the lists in an object; anything else is one record."""
    check_size(content, MAX_BYTES)
    value = _json(text_of(content), "")
    if isinstance(value, list):
        return stem, _sections((stem,), value)
    if not isinstance(value, dict):
        return stem, _sections((stem,), [value])
    lists = {key: part for key, part in value.items() if isinstance(part, list) and any(isinstance(p, dict) for p in part)}
    rest = {key: part for key, part in value.items() if key not in lists}
    sections = _sections((stem,), [rest]) if rest else []
    for key, part in lists.items():
        sections += _sections((stem, one_line(key)), part)
    return stem, sections


def record_lines(content: bytes, stem: str) -> Read:
    """Read JSONL: a record on each line."""
    check_size(content, MAX_BYTES)
    lines = enumerate(text_of(content).split("\n"), 1)
    return stem, _sections((stem,), [_json(line, f"line {number}: ") for number, line in lines if line.strip()])


def _table(text: str, delimiter: str, stem: str) -> Read:
    rows = _rows(text, delimiter)
    names = [one_line(cell) for cell in next(rows, [])]
    if not _is_header(names):
        names, rows = [], _rows(text, delimiter)
    sections = [Section((stem,), _row_text(row, names)) for row in islice(rows, MAX_ROWS + 1)]
    if len(sections) > MAX_ROWS:
        raise Unreadable(f"more than {MAX_ROWS} rows")
    return stem, sections


def _delimiter(text: str) -> str:
    """Return what makes rows of one width, several columns wide; the sniffer of `csv` may take a letter, or minutes."""

    def score(delimiter: str) -> tuple[bool, bool, int]:
        widths = [len(row) for row in islice(_rows(text, delimiter), _SAMPLE_ROWS)]
        narrowest = min(widths, default=0)
        return narrowest > 1, len(set(widths)) == 1, narrowest

    return max(_DELIMITERS, key=score)


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
        if len(row) > MAX_COLUMNS:
            raise Unreadable(f"{len(row)} columns, more than {MAX_COLUMNS}")
        if any(cell.strip() for cell in row):
            yield row


def _is_header(cells: Sequence[str]) -> bool:
    named = [cell for cell in cells if cell]
    numbers = [cell for cell in named if _NUMBER.fullmatch(cell) and not _YEAR.fullmatch(cell)]
    return bool(named) and not numbers and len(set(named)) == len(named)


def _row_text(row: Sequence[str], names: Sequence[str]) -> str:
    cells = [(names[at] if at < len(names) and names[at] else f"column {at + 1}", one_line(cell)) for at, cell in enumerate(row)]
    return "\n".join(f"{name}: {cell}" for name, cell in cells if cell)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if not where else where
        raise Unreadable(f"not JSON ({at}column {error.colno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:  # an integer of thousands of digits is a ValueError
        raise Unreadable(f"not JSON that is read here ({where}{error})") from None


def _sections(path: tuple[str, ...], values: Sequence[Any]) -> list[Section]:
    if len(values) > MAX_ROWS:
        raise Unreadable(f"{len(values)} records, more than {MAX_ROWS}")
    return [_section(path, value) for value in values]


def _section(path: tuple[str, ...], value: Any) -> Section:
    if not isinstance(value, dict):
        return Section(path, "\n".join(_lines("", value, 0)))
    text_key, title_key = _key(value, _TEXT_KEYS), _key(value, _TITLE_KEYS)
    if text_key is None:
        return Section(path, "\n".join(_lines("", value, 0)))
    rest = {key: part for key, part in value.items() if key not in (text_key, title_key)}
    below = (*path, one_line(value[title_key])) if title_key else path
    return Section(below, "\n\n".join(part for part in (value[text_key].strip(), "\n".join(_lines("", rest, 0))) if part))


def _key(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if isinstance(record.get(key), str) and record[key].strip()), None)


def _lines(key: str, value: Any, depth: int) -> Iterator[str]:
    """Yield `key: value` lines of what JSON holds; a list of plain values is one line."""
    if depth > MAX_DEPTH:
        raise Unreadable(f"more than {MAX_DEPTH} objects or lists inside each other")
    nested = isinstance(value, list) and any(isinstance(part, dict | list) for part in value)
    if isinstance(value, dict) or nested:
        for name, part in value.items() if isinstance(value, dict) else enumerate(value, 1):
            yield from _lines(f"{key}.{name}" if key else str(name), part, depth + 1)
        return
    parts = [one_line(_scalar(part)) for part in (value if isinstance(value, list) else [value]) if part is not None]
    shown = ", ".join(part for part in parts if part)
    if shown:
        yield f"{one_line(key)}: {shown}" if key else shown


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
