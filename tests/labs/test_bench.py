"""The comparison of trainers: on a shrunk model in every run of the tests, in earnest where there is data and time."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labs.bench import xquad
from pipelines import catalogue, weights
from pipelines.config import ROOT
from pipelines.errors import DataError
from pipelines.tune import rehearsal
from tests.conftest import MODEL

COLOURS = ("red", "blue", "green", "grey", "brown", "white")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shrunk model and with 40 short articles in SQuAD's form."""
    folder = tmp_path_factory.mktemp("bench")
    rehearsal.build(catalogue.runnable(MODEL), rehearsal.texts(), folder / "models" / MODEL)
    articles = []
    for n in range(40):
        colour = COLOURS[n % len(COLOURS)]
        qas = [{"id": f"{n}a", "question": "What is its colour?", "answers": [{"text": colour}, {"text": f"the {colour} one"}]},
               {"id": f"{n}b", "question": "Which number has it?", "answers": [{"text": str(n)}]}]  # fmt: skip
        articles.append(
            {"paragraphs": [{"context": f"House {n} of the long street is {colour}. Its number is {n}.", "qas": qas}]}
        )
    (folder / "data").mkdir()
    (folder / "data" / xquad.FILE).write_text(json.dumps({"data": articles}), encoding="utf-8")
    return folder


def bench(place: Path | None, *options: str) -> subprocess.CompletedProcess[str]:
    own = {"LLMLAB_MODELS": str(place / "models"), "LLMLAB_DATA": str(place / "data")} if place else {}
    return subprocess.run([sys.executable, "-m", "labs", "bench", "tune", *options], cwd=ROOT, env=os.environ | own,
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.slow
def test_two_trainers_on_a_shrunk_model(place: Path) -> None:
    done = bench(place, "--quick", "--minutes", "0.05", "--questions", "4", "--contender", "ours", "--contender", "plain")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(document["examples_per_second"]) == {"ours", "plain"}
    assert document["ratio_to_plain"] == document["examples_per_second"]["ours"] / document["examples_per_second"]["plain"]
    assert document["packed_loss_gap"] < 1e-5
    assert document["packed_gradient_gap"] < 1e-5
    assert document["equal_steps"]["steps"] == 1
    assert set(document["equal_steps"]["f1"]) == {"ours", "plain"}
    for name in ("ours", "plain"):
        curve = document["curve"][name]
        assert [point["steps"] for point in curve] == sorted({point["steps"] for point in curve})
        assert curve[-1]["examples"] >= 8 * (curve[-1]["steps"] - 1)
        assert 0 < curve[-1]["minutes"] < 1
        assert document["peak_rss_bytes"][name] > 10**8
        assert document["supervised_tokens_per_second"][name] < document["total_tokens_per_second"][name]
        assert document["forgetting"][name]["general"] != 0
    folder = Path(done.stderr.split("curves, logs and adapters are in ")[1].splitlines()[0])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["test_f1"] == document["test_f1"]
    shutil.rmtree(folder)


def test_bad_input_is_told(place: Path, tmp_path: Path) -> None:
    done = bench(place, "--contender", "unsloth")
    assert done.returncode and "unsloth" in done.stderr and "trl_default" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "data").mkdir()
    for content, said in ((None, "is absent"), ('{"data": [{"paragraphs": 3}]}', "not in SQuAD's form")):
        if content:
            (tmp_path / "data" / xquad.FILE).write_text(content, encoding="utf-8")
        done = bench(tmp_path, "--contender", "ours")
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_articles_are_split_and_samples_repeat(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_DATA", str(place / "data"))
    rows, asked = xquad.train_rows(), xquad.held_out_questions(None)
    assert len(rows) == 72
    assert [row.reply for row in rows[:2]] == ["red", "0"]
    assert len(asked) == 8
    assert xquad.held_out_questions(5) == xquad.held_out_questions(5)
    assert not {q.id for q in asked} & {row.origin.split(":")[1] for row in rows}
    monkeypatch.setenv("LLMLAB_DATA", "/nowhere")
    with pytest.raises(DataError, match="absent"):
        xquad.train_rows()


def test_scores_take_the_best_answer() -> None:
    questions = [xquad.Question("1", "", "", ("the red one", "red")), xquad.Question("2", "", "", ("forty two",))]
    scores = xquad.scored(questions, ["Red.", "forty"])
    assert scores.exact_match == 0.5
    assert scores.f1 == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.slow
def test_replies_are_those_of_generate() -> None:
    """Prefixes once, questions side by side, finished ones dropped: the tokens are those of transformers, one by one."""
    import torch
    from transformers import AutoTokenizer

    from pipelines.tune.finetune import load_base

    folder = weights.hf_directory(catalogue.runnable(MODEL))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_base(folder, "cpu", quantised=False).eval()
    text = "The Rhine rises in the Alps and ends in the North Sea. It is 1230 kilometres long."
    chats = [[{"role": "user", "content": xquad.prompt_text(text, question)}]
             for question in ("Where does it rise?", "How long is the Rhine?", "Where does it end?")]  # fmt: skip
    chats.append([{"role": "user", "content": "What is the capital of France? Answer with one word."}])
    with torch.inference_mode():
        ours = xquad.replies_to(model, tokenizer, chats)
        for chat, reply in zip(chats, ours, strict=True):
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            made = model.generate(**ids, max_new_tokens=xquad.MAX_NEW_TOKENS, do_sample=False, temperature=None, top_p=None,
                                  pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
            assert reply == tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is installed by make bench")
@pytest.mark.skipif(not (xquad.data_folder() / xquad.FILE).is_file(), reason="no XQuAD file; LLMLAB_DATA names its folder")
def test_quick_comparison_with_trl() -> None:
    compared = ("ours", "trl_default", "trl_tuned")
    done = bench(None, "--quick", "--questions", "8", *(f"--contender={name}" for name in compared))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["ratio_to_trl_default"] >= 5
    assert document["ratio_to_trl_tuned"] >= 2
    assert document["peak_rss_ratio"] <= 0.5
    assert document["packed_loss_gap"] < 1e-5
