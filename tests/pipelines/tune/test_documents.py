"""A folder of documents as training data: what is learnt of it, to the token, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError, DataError
from pipelines.rag.load import Document, Section, load
from pipelines.tune import data, source
from pipelines.tune.documents import document_text, folder_sha256, read_documents
from pipelines.tune.finetune import Job, finetune
from pipelines.tune.packing import Packed, encode
from pipelines.tune.recipe import Recipe, load_recipe
from pipelines.tune.report import mask, overlap
from pipelines.tune.rows import Row
from tests.conftest import MODEL, Quiet
from tests.pipelines.tune.conftest import tiny_model, tiny_recipe

GUIDE = "# Guide\n\nHow to tune.\n\n## Rates\n\n" + "Begin with a low rate, and raise it. " * 60 + "\n\n## Ends\n\nStop early.\n"
PAGE = "<html><title>Page</title><body><h1>Page</h1><p>One paragraph.</p><h2>More</h2><p>Another.</p></body></html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "deep").mkdir(parents=True)
    (root / "guide.md").write_text(GUIDE, encoding="utf-8")
    (root / "deep" / "page.html").write_text(PAGE, encoding="utf-8")
    (root / "note.txt").write_text("Ends with <|im_end|> and </s>, as text.", encoding="utf-8")
    (root / "photo.heic").write_bytes(b"\xff\xd8")
    return root


def recipe(folder: Path, *overrides: str) -> Recipe:
    given = [f"data={folder}", "schedule.steps=null", "schedule.epochs=1", "schedule.max_tokens=256"]
    return load_recipe("lora", [*given, *overrides])


def sequences(prepared: source.Prepared) -> list[Packed]:
    return [p for step in prepared.steps for p in step]


def test_a_document_reads_as_it_stands(folder: Path) -> None:
    texts = {d.source: document_text(d) for d in load(folder)[0]}
    assert texts["deep/page.html"].split() == "Page One paragraph. More Another.".split()
    assert texts["guide.md"].split() == GUIDE.replace("#", "").split()
    assert texts["note.txt"] == "Ends with <|im_end|> and </s>, as text."


def test_pages_do_not_repeat_the_title_and_empty_headings_stand_once() -> None:
    pages = Document("a.pdf", "Thesis", (Section(("Thesis",), "one", 1), Section(("Thesis",), "two", 2)))
    assert document_text(pages) == "Thesis\n\none\n\ntwo"
    bare = Document("b.md", "B", (Section(("B", "Only a heading"), "Only a heading"), Section(("B", "Next"), "x")))
    assert document_text(bare) == "B\n\nOnly a heading\n\nNext\n\nx"


def test_pieces_are_the_whole_text_once_in_order(folder: Path, tokenizer: Any) -> None:
    read = read_documents(folder, tokenizer, 128)
    assert read.documents == 3 and [s.path for s in read.skipped] == ["photo.heic"]
    for document in load(folder)[0]:
        rows = [row for row in read.rows if row.origin.startswith(document.source + "#")]
        assert " ".join(row.text or "" for row in rows).split() == document_text(document).split()
        assert [row.ends for row in rows] == [False] * (len(rows) - 1) + [True]
        assert all(len(tokenizer(row.text, split_special_tokens=True)["input_ids"]) <= 128 for row in rows)
    assert sum(row.origin.startswith("guide.md#") for row in read.rows) > 3


@pytest.mark.parametrize("begins", [False, True])
def test_labels_are_those_of_a_direct_tokenisation(folder: Path, tokenizer: Any, begins: bool) -> None:
    """The oracle is the tokenizers library itself: each token is to be followed by the next, the last by the end or nothing."""
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    if begins:  # as the tokenizers of Llama and Mistral do
        first = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=first)
    direct = copy.deepcopy(tokenizer.backend_tokenizer)
    direct.encode_special_tokens = True
    rows = read_documents(folder, tokenizer, 128).rows
    for row in rows:
        encoded = encode(row, tokenizer)
        stream = direct.encode(row.text, add_special_tokens=begins).ids + [tokenizer.eos_token_id] * row.ends
        assert begins == (stream[0] == tokenizer.bos_token_id)
        assert encoded.tokens == stream[:-1] and encoded.labels == stream[1:]
        assert stream.count(tokenizer.eos_token_id) == row.ends
    assert any("<|im_end|>" in (row.text or "") for row in rows)


def test_steps_hold_every_piece_alone_and_supervise_every_place(folder: Path, tokenizer: Any) -> None:
    prepared = source.prepare(recipe(folder), tokenizer)
    rows = read_documents(folder, tokenizer, 256).rows
    assert prepared.rows == len(rows) and prepared.held_out == []
    assert all(None not in p.labels for p in sequences(prepared))
    found = sorted(tokenizer.decode([p.tokens[i] for i, t in enumerate(p.tree) if t == n]) for p in sequences(prepared)
                   for n in set(p.tree))  # fmt: skip
    assert found == sorted(tokenizer.decode(encode(row, tokenizer).tokens) for row in rows)
    assert "3 documents in" in prepared.notes[0] and "1 files left out: photo.heic" in prepared.notes[0]


def test_the_loss_is_the_library_s_own(folder: Path, tiny: Path, tokenizer: Any) -> None:
    import torch

    from pipelines.tune.sft import mean_loss

    model = tiny_model(tiny, tiny_recipe()).eval()
    prepared = source.prepare(recipe(folder), tokenizer)
    total = tokens = 0.0
    for row in read_documents(folder, tokenizer, 256).rows:
        ids = tokenizer(row.text, split_special_tokens=True)["input_ids"] + [tokenizer.eos_token_id] * row.ends
        with torch.inference_mode():
            total += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1)
        tokens += len(ids) - 1
    assert mean_loss(model, sequences(prepared), 2) == pytest.approx(total / tokens, rel=1e-5)
    assert prepared.supervised == tokens


def test_whole_documents_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for n in range(40):
        (root / f"{n:02}.md").write_text(f"# Town {n}\n\n" + f"Town {n} lies on river {n}. " * 60, encoding="utf-8")
    prepared = source.prepare(recipe(root, "held_out_share=0.2"), tokenizer)
    held_out = {row.origin.split("#")[0] for row in prepared.held_out}
    assert 4 <= len(held_out) <= 8
    learnt = "".join(tokenizer.decode(p.tokens) for p in sequences(prepared))
    for n in range(40):
        assert (f"lies on river {n}." in learnt) == (f"{n:02}.md" not in held_out)


def test_questions_that_stand_in_the_documents_overlap(folder: Path, tokenizer: Any) -> None:
    question = "Begin with a low rate, and raise it. Begin with a low rate, and raise it. Why?"
    row = Row(({"role": "user", "content": question}, {"role": "assistant", "content": "Because."}), None, "eval:1")
    rows = read_documents(folder, tokenizer, 256).rows
    assert overlap(rows, [row]) == ["eval:1"]
    assert overlap([row], rows) == [r.origin for r in rows if "raise it. Begin with" in (r.text or "")]
    shown = mask(rows[0], tokenizer)
    assert [learnt for _, learnt in shown] == [False, True] and "".join(text for text, _ in shown).startswith("Page")


def test_the_fingerprint_follows_names_and_content_of_documents(folder: Path) -> None:
    def now() -> str:
        fingerprint = source.resolved(recipe(folder))["file"]
        assert fingerprint == {"name": "docs", "sha256": folder_sha256(folder)}
        return str(fingerprint["sha256"])

    prints = [now()]
    (folder / "photo.heic").write_bytes(b"other")
    (folder / ".hidden.md").write_text("x", encoding="utf-8")
    assert now() == prints[0]
    (folder / "note.txt").write_text("Other text.", encoding="utf-8")
    prints.append(now())
    (folder / "note.txt").rename(folder / "renamed.txt")
    prints.append(now())
    assert len(set(prints)) == 3
    copied = shutil.copytree(folder, folder.parent / "elsewhere")
    assert folder_sha256(Path(copied)) == prints[2]


def test_a_folder_without_documents_and_preferences_from_a_folder_are_refused(
    tmp_path: Path, folder: Path, tokenizer: Any
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for content in (None, ("rows.jsonl", b"{}"), ("blank.md", b"")):
        if content:
            (empty / content[0]).write_bytes(content[1])
        with pytest.raises(DataError, match="holds no readable document(.|\n)*next: +llmlab finetune --data"):
            source.prepare(recipe(empty), tokenizer)
    quiet = Quiet()
    with pytest.raises(ConfigError, match="dpo learns from preferences(.|\n)*--recipe lora --data"):
        finetune(Job(MODEL, "dpo", (f"data={folder}",), rehearse=True, pull=False), quiet)
    assert quiet.lines == []


@pytest.mark.parametrize("name", ["lora", "full", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qlora", "dora"))])
def test_every_supervised_method_learns_a_folder(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMLAB_RUNS", str(tmp_path / "runs"))
    for n in range(40):
        (folder / f"{n:02}.md").write_text(f"# Town {n}\n\nTown {n} lies on river {n}.", encoding="utf-8")
    quiet = Quiet()
    job = Job(MODEL, name, (f"data={folder}", "optimiser.learning_rate=0.005"), rehearse=True, pull=False)
    run = finetune(job, quiet)
    assert any("43 documents in" in line and "continued pre-training" in line for line in quiet.lines)
    assert run.json("config.json")["data"] == {"file": {"name": "docs", "sha256": folder_sha256(folder)}}
    loss = run.json("proof.json")["held_out_loss"]
    assert loss["after"] < loss["before"]


def test_the_knowledge_of_the_lab_can_be_learnt(tokenizer: Any) -> None:
    read = read_documents(data.KNOWLEDGE, tokenizer, 1024)
    assert read.documents == len(list(data.KNOWLEDGE.glob("*.md"))) and read.skipped == []
