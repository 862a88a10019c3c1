"""A user's file -> rows: JSONL, JSON, CSV or Parquet, in any of five formats that people have.

Every problem is told with file, line and what to do, several at once; nothing is skipped or cut in silence. Documents
without questions are no rows of a file: see pipelines.tune.documents.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.tune.rows import Message, Row

FORMATS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, output (and input, system)",
    "prompt/completion": "prompt, completion",
    "preference": "chosen, rejected (and prompt)",
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
GROUP_FIELD = "group"  # beside those of a format: rows with the same one are held out together
SHOWN_PROBLEMS = 5
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")

Record = Mapping[str, Any]


class _Unfit(ValueError):
    """A record that cannot be a row; the message says why."""


def read_rows(path: Path) -> list[Row]:
    """Read a file of training rows.

    Args:
        path: .jsonl, .json (an array), .csv or .parquet; .jsonl also compressed as .jsonl.gz.

    Raises:
        DataError: the file cannot be read, is empty, or has rows that fit no format; names line and reason.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder", f"a file of rows: {', '.join(SUFFIXES)}",
                        f"llmlab finetune --data {path} learns its documents; llmlab index {path} finds them")  # fmt: skip
    records = list(_records(path))
    if not records:
        raise DataError(f"{path.name} holds no rows", "at least one", f"a file with one of: {'; '.join(FORMATS.values())}")
    reader = _READERS[_format(path, records[0])]
    rows, problems = [], []
    for line, record in records:
        try:
            rows.append(_row(reader(record), f"{path.name}:{line}", str(record.get(GROUP_FIELD) or "")))
        except _Unfit as problem:
            problems.append(f"{path.name}:{line}: {problem}")
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise DataError(f"{len(problems)} of {len(records)} rows cannot be used:\n  " + "\n  ".join(shown) + more,
                        FORMATS[_format(path, records[0])], f"correct these lines of {path}")  # fmt: skip
    return rows


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield (line, or row number for CSV and Parquet; record)."""
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix not in SUFFIXES or (path.suffix == ".gz" and suffix != ".jsonl"):
        raise DataError(f"{path.name} ends with {path.suffix or 'nothing'}", f"one of {', '.join(SUFFIXES)}, .jsonl.gz",
                        "rename the file after what it holds, or convert it")  # fmt: skip
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    text = _text(path)
    if suffix == ".csv":
        yield from _csv(path, text)
    elif suffix == ".json":
        yield from _array(path, text)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _object(path, number, line)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name}:{line}: a byte that is not UTF-8", "UTF-8 text",
                        f"iconv -f latin1 -t utf-8 {path.name} > new{path.suffix}, if it is Latin-1") from None  # fmt: skip
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a readable file", f"ls -l {path}") from None


def _object(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path.name}:{number}: not JSON ({error})", "one JSON object on each line",
                        "a .json file holds one array; name it so") from None  # fmt: skip
    return _mapping(path, number, record)


def _mapping(path: Path, number: int, record: Any) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"{path.name}:{number}: {type(record).__name__}, not an object", "one of " + "; ".join(FORMATS.values()))
    return record


def _array(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    try:
        content = json.loads(text or "null")
    except ValueError as error:
        raise DataError(f"{path.name}: not JSON ({error})", "an array of objects", "one object on each line is .jsonl") from None
    if not isinstance(content, list):
        raise DataError(
            f"{path.name} holds {type(content).__name__}", "an array of objects", "name it .jsonl if each line is one"
        )
    for number, record in enumerate(content, 1):
        yield number, _mapping(path, number, record)


def _csv(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    import csv
    import io

    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(f"{path.name}:{reader.line_num}: as many fields as the header has, it does not have",
                                f"{len(reader.fieldnames or [])} fields", "quote fields that hold commas")  # fmt: skip
            yield reader.line_num, {key: value for key, value in record.items() if value != ""}
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.line_num}: {error}", "CSV with a header", "quote fields that hold quotes") from None


def _parquet(path: Path) -> Iterator[tuple[int, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}".splitlines()[0], "a Parquet file", f"ls -l {path}") from None
    yield from ((number, {k: v for k, v in record.items() if v is not None}) for number, record in enumerate(records, 1))


def _format(path: Path, first: tuple[int, Record]) -> str:
    line, record = first
    keys = set(record)
    for name, needed in _NEEDED.items():
        if needed <= keys:
            return name
    came = f"{path.name}:{line} has the fields {', '.join(sorted(keys)) or '(none)'}"
    raise DataError(came, "one of " + "; ".join(FORMATS.values()), "rename the fields")


def _messages(record: Record) -> tuple[list[Message], str | None]:
    return _turns(_field(record, "messages", list), "role", "content"), None


def _sharegpt(record: Record) -> tuple[list[Message], str | None]:
    return _turns(_field(record, "conversations", list), "from", "value"), None


def _alpaca(record: Record) -> tuple[list[Message], str | None]:
    asked = "\n\n".join(p for p in (_field(record, "instruction", str), record.get("input") or "") if p)
    return [*_system(record), _user(asked), _assistant(_field(record, "output", str))], None


def _completion(record: Record) -> tuple[list[Message], str | None]:
    prompt = record.get("prompt")
    turns = (
        _turns(prompt, "role", "content")
        if isinstance(prompt, list)
        else [*_system(record), _user(_field(record, "prompt", str))]
    )
    return [*turns, _assistant(_field(record, "completion", str))], None


def _preference(record: Record) -> tuple[list[Message], str | None]:
    sides = [_conversation(record, name) for name in ("chosen", "rejected")]
    prompts = [side[:-1] for side in sides]
    if prompts[0] != prompts[1]:
        raise _Unfit("chosen and rejected answer different prompts")
    return sides[0], sides[1][-1]["content"]


def _conversation(record: Record, name: str) -> list[Message]:
    """Return one side of a preference with its prompt: a text, a list of turns, or a whole Human/Assistant transcript."""
    side, prompt = record.get(name), record.get("prompt")
    before = _turns(prompt, "role", "content") if isinstance(prompt, list) else [_user(prompt)] if isinstance(prompt, str) else []
    if isinstance(side, list):
        return before + _turns(side, "role", "content")
    text = _field(record, name, str)
    if before:
        return [*before, _assistant(text)]
    parts = TRANSCRIPT.split(text)
    if len(parts) < 5 or parts[0].strip():
        raise _Unfit(f"{name} has no prompt: neither a prompt field nor a transcript of Human and Assistant")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _turns(turns: Sequence[Any], who: str, what: str) -> list[Message]:
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get(who), str) or not isinstance(turn.get(what), str):
            raise _Unfit(f"turn {number} is not {{{who}, {what}}} with texts")
        if turn[who] not in ROLES:
            raise _Unfit(f"turn {number} has the {who} {turn[who]!r}; known: {', '.join(ROLES)}")
        found.append({"role": ROLES[turn[who]], "content": turn[what]})
    return found


def _row(read: tuple[list[Message], str | None], origin: str, group: str) -> Row:
    turns, rejected = read
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) < 2 or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)] or spoken[-1] != "assistant":
        raise _Unfit(
            f"the turns are {', '.join(roles) or '(none)'}; they must alternate user and assistant, and end with assistant"
        )
    empty = [number for number, turn in enumerate(turns, 1) if not turn["content"].strip()]
    if empty or (rejected is not None and not rejected.strip()):
        raise _Unfit(f"turn {empty[0]} is empty" if empty else "rejected is empty")
    return Row(tuple(turns), rejected, origin, group)


def _field(record: Record, name: str, kind: type) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        raise _Unfit(f"{name} is {'missing' if value is None else type(value).__name__}, not {kind.__name__}")
    return value


def _system(record: Record) -> list[Message]:
    system = record.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


_NEEDED = {"preference": {"chosen", "rejected"}, "messages": {"messages"}, "sharegpt": {"conversations"},
           "alpaca": {"instruction", "output"}, "prompt/completion": {"prompt", "completion"}}  # fmt: skip
_READERS: dict[str, Callable[[Record], tuple[list[Message], str | None]]] = {
    "preference": _preference, "messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt/completion": _completion,
}  # fmt: skip
