"""The report on a file of rows: every figure against one that is known by construction or by another implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ROOT
from pipelines.tune.report import mask, overlap, report
from pipelines.tune.rows import Row

LONG = "The quick brown fox jumps over the lazy dog near the old mill by the river every single morning at six"


def row(asked: str, said: str, origin: str = "") -> Row:
    return Row(({"role": "user", "content": asked}, {"role": "assistant", "content": said}), None, origin)


def test_copies_and_near_copies_are_found(tokenizer: Any) -> None:
    asked = {"a": LONG, "b": LONG.upper() + "!", "c": LONG + " o'clock", "d": "Short", "e": "Another short text"}
    rows = [row(text, "Yes.", origin) for origin, text in asked.items()]
    found = report(rows, tokenizer, 512)
    assert found.copies == [("b", "a")]
    ((first, second, similarity),) = [n for n in found.near_copies if n[0] == "c"][:1]
    assert (first, second) in (("c", "a"), ("c", "b"))
    assert similarity == pytest.approx(jaccard(f"{LONG} o'clock Yes", f"{LONG} Yes"), abs=1e-3)
    assert not {n[0] for n in found.near_copies} & {"d", "e"}


def jaccard(one: str, other: str) -> float:
    grams = []
    for text in (one, other):
        words = text.lower().replace("'", " ").split()
        grams.append({" ".join(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_overlap_is_thirteen_words_or_a_whole_short_prompt() -> None:
    rows = [row(LONG, "Yes."), row("Who wrote Faust?", "Goethe.")]
    asked = {
        "same": "who wrote faust",
        "part": "Before: " + " ".join(LONG.split()[3:16]),
        "twelve": " ".join(LONG.split()[3:15]) + " x",
    }
    evaluation = [row(text, "?", name) for name, text in asked.items()]
    assert overlap(rows, evaluation) == ["same", "part"]


def test_lengths_and_the_mask_are_those_of_the_template(tokenizer: Any) -> None:
    rows = [row("Hello", "Good day to you.", "a"), row("word " * 80, "yes", "b")]
    found = report(rows, tokenizer, 64)
    for i, r in enumerate(rows):
        whole = tokenizer.apply_chat_template(list(r.messages), return_dict=True)["input_ids"]
        end = len(whole) - 1 - whole[::-1].index(tokenizer.eos_token_id)
        assert found.prompt_tokens[i] + found.reply_tokens[i] == end + 1
        assert found.reply_tokens[i] == len(tokenizer(r.reply)["input_ids"]) + 1
    assert found.too_long == ["b"] and found.silent == [] and found.endless == []
    pieces = mask(rows[0], tokenizer)
    assert "".join(text for text, learnt in pieces if learnt) == "Good day to you." + tokenizer.eos_token
    assert "Hello" in "".join(text for text, learnt in pieces if not learnt)


def test_the_command_shows_it_all_and_ends_with_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Where is town {n}?", "completion": f"In the valley, write to mayor{n}@town.example"} for n in range(5)]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[0]]), encoding="utf-8")
    command = [sys.executable, "-m", "labs", "data", "report", str(file), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["rows"] == 6 and figures["exact_copies"] == 1 and figures["private"]["e-mail"] == 6
    assert 0 < figures["supervised_share"] < 1
    assert (tmp_path / "rows-lengths.png").read_bytes().startswith(b"\x89PNG")
    broken = subprocess.run([*command[:5], str(tmp_path / "none.jsonl")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert broken.returncode == 1 and "cannot be read" in broken.stderr and "Traceback" not in broken.stderr
