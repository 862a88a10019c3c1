"""A user's file: the formats that are recognised, and what is said about the rest."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ROOT
from pipelines.errors import DataError
from pipelines.tune.files import read_rows

DATA = Path(os.environ.get("LLMLAB_DATA") or ROOT.parent / "shared" / "data")
TALKS = [("Who wrote Faust?", "Goethe."), ("Add 2 and 3.\n\nOnly the number.", "5"), ("Café?", "Ja, bitte: ☕")]


def as_format(name: str, asked: str, said: str) -> dict[str, Any]:
    return {
        "messages": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]},
        "sharegpt": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]},
        "alpaca": {"instruction": asked, "input": "", "output": said},
        "prompt/completion": {"prompt": asked, "completion": said},
        "preference": {"prompt": asked, "chosen": said, "rejected": "No."},
    }[name]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    else:
        lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n"
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt/completion", "preference"])
def test_the_same_rows_come_out_of_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "csv" and name in ("messages", "sharegpt"):
        pytest.skip("CSV has no lists")
    rows = read_rows(write(tmp_path / f"rows.{suffix}", [as_format(name, *talk) for talk in TALKS]))
    assert [(row.prompt[0]["content"], row.reply) for row in rows] == TALKS
    assert [row.rejected for row in rows] == [("No." if name == "preference" else None)] * 3
    assert rows[0].origin.startswith(f"rows.{suffix}:")


def test_alpaca_input_and_system_are_part_of_the_prompt(tmp_path: Path) -> None:
    record = {"instruction": "Translate.", "input": "Guten Tag", "system": "Be brief.", "output": "Good day"}
    (row,) = read_rows(write(tmp_path / "a.jsonl", [record]))
    assert row.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Translate.\n\nGuten Tag"}]


def test_transcripts_of_two_answers_share_their_prompt(tmp_path: Path) -> None:
    start = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: How are you?\n\nAssistant:"
    (row,) = read_rows(write(tmp_path / "p.jsonl", [{"chosen": start + " Fine.", "rejected": start + " Go away."}]))
    assert [t["role"] for t in row.messages] == ["user", "assistant", "user", "assistant"]
    assert (row.reply, row.rejected) == ("Fine.", "Go away.")


def test_real_sets_are_read() -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    pairs = read_rows_of(DATA / "hh_rlhf_harmless_test.jsonl.gz", 200)
    assert len(pairs) == 200 and all(p.rejected for p in pairs)


def read_rows_of(path: Path, count: int) -> list[Any]:
    """The first rows that fit; the set holds a few pairs whose prompts differ."""
    import tempfile

    with gzip.open(path, "rt", encoding="utf-8") as stream, tempfile.TemporaryDirectory() as folder:
        rows: list[Any] = []
        for line in stream:
            part = Path(folder) / "part.jsonl"
            part.write_text(line, encoding="utf-8")
            try:
                rows += read_rows(part)
            except DataError:
                continue
            if len(rows) == count:
                break
        return rows


GOOD = json.dumps(as_format("messages", "Hello", "Hi"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("broken.jsonl", f"{GOOD}\n{{oops\n".encode(), "broken.jsonl:2: not JSON"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl:1: list, not an object"),
        ("latin.jsonl", GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n', "latin.jsonl:2: a byte that is not UTF-8"),
        ("unknown.jsonl", b'{"question": "a", "answer": "b"}\n', "has the fields answer, question"),
        ("object.json", b'{"a": 1}', "holds dict"),
        ("text.txt", b"hello", "ends with .txt"),
        ("short.csv", b"prompt,completion\na\n", "short.csv:2"),
        ("fake.parquet", b"PAR1 not", "cannot be read as Parquet"),
        ("packed.jsonl.gz", b"not gzip", "cannot be read"),
        ("mixed.jsonl", f'{GOOD}\n{{"prompt": "a", "completion": "b"}}\n'.encode(), "mixed.jsonl:2: messages is missing"),
        ("role.jsonl", b'{"messages": [{"role": "tool", "content": "a"}]}\n', "the role 'tool'"),
        (
            "order.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "must alternate",
        ),
        ("last.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "end with assistant"),
        ("number.jsonl", b'{"prompt": "a", "completion": 3}\n', "completion is int, not str"),
        ("silent.jsonl", b'{"prompt": "a", "completion": " "}\n', "turn 2 is empty"),
        ("alone.jsonl", b'{"chosen": "a", "rejected": "b"}\n', "chosen has no prompt"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert message in str(caught.value)


def test_many_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join([GOOD] + ['{"messages": []}'] * 8), encoding="utf-8")
    with pytest.raises(DataError, match=r"8 of 9 rows(.|\n)*many.jsonl:2(.|\n)*many.jsonl:6(.|\n)*and 3 more"):
        read_rows(path)


def test_a_folder_and_a_missing_file_are_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
