"""Thresholds below which the documents hold no answer: learned, kept with the index, used, and refused when broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.rag import abstention, ranking
from pipelines.rag.abstention import kept, learn, save
from pipelines.rag.asked import Asked, read_questions
from pipelines.rag.embed import Embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.lexical import Lexical
from pipelines.rag.retrieve import Retriever, open_retriever
from tests.pipelines.rag.conftest import write_pages

BIRDS = (
    "heron", "plover", "avocet", "godwit", "curlew", "dunlin", "knot", "ruff", "snipe", "whimbrel", "stint", "sanderling",
    "turnstone", "lapwing", "dotterel", "redshank", "greenshank", "stilt", "pratincole", "tern", "skua", "oystercatcher",
)  # fmt: skip


@pytest.fixture
def birds(tmp_path: Path, config: RagConfig, minilm: Embedder) -> Retriever:
    pages = {f"{b}.md": f"# {b.title()}\n\nThe {b} was recorded {n} times at the northern lagoon.\n" for n, b in enumerate(BIRDS)}
    sync(write_pages(tmp_path / "birds", pages), "birds", config, minilm)
    return Retriever(open_index("birds", minilm), minilm, config)


ASKED = [Asked(f"How often was the {bird} recorded?", f"{bird}.md") for bird in BIRDS]


def test_a_threshold_keeps_its_promise_and_tells_questions_apart(birds: Retriever) -> None:
    seen: list[tuple[int, int]] = []
    found = learn(birds, [*ASKED, Asked("Who painted the ceiling of the chapel?", None)], 0.1, lambda *s: seen.append(s))
    assert (found.answerable, found.unanswerable, seen[-1]) == (len(BIRDS), len(BIRDS) + 1, (len(BIRDS) + 1, len(BIRDS) + 1))
    assert found.refused <= 0.1 and found.caught > 0.9 and found.auc > 0.95
    signs = [birds.sign(one.text) for one in ASKED]
    assert found.refused == pytest.approx(np.mean([s < found.value for s in signs]))
    strict = learn(birds, ASKED, 0.0, lambda *_: None)
    assert strict.refused == 0 and strict.value == pytest.approx(min(signs))


def test_a_kept_threshold_is_used_and_a_sync_keeps_it(
    birds: Retriever, tmp_path: Path, config: RagConfig, minilm: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "How is QLoRA different from LoRA?"
    assert birds.retrieve(question, 3).answerable
    found = learn(birds, ASKED, 0.05, lambda *_: None)
    save("birds", found)
    opened = open_retriever("birds", minilm, config)
    assert opened.threshold == found.value
    assert not opened.retrieve(question, 3).answerable and opened.retrieve(ASKED[5].text, 3).answerable
    assert opened.retrieve(question, 3).hits  # they are shown all the same
    sync(write_pages(tmp_path / "birds", {"new.md": "# New\n\nOne more page.\n"}), "birds", config, minilm)
    again = open_retriever("birds", minilm, config)
    assert again.threshold == found.value and kept(again.index, config) == found
    assert kept(again.index, config.model_copy(update={"dense_weight": 0.0})) is None
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "FUSION", "another way")
        assert kept(again.index, config) is None
    other = write_pages(tmp_path / "other", {"new.md": "# New\n\nAnother folder.\n"})
    sync(other, "birds", config, minilm)
    assert open_retriever("birds", minilm, config).threshold is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"value": 0.5}', '{"format": 1, "value": "x"}'])
@pytest.mark.usefixtures("birds")
def test_a_broken_file_is_told(config: RagConfig, minilm: Embedder, index_folder: Path, content: str) -> None:
    (index_folder / "birds" / abstention.FILE).write_text(content)
    with pytest.raises(DataError, match="cannot be read") as raised:
        open_retriever("birds", minilm, config)
    assert raised.value.next_command.startswith("llmlab index calibrate birds")


def test_questions_come_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "A?", "source": "a.md"}\n\n{"question": "B?"}\n{"question": "C?", "source": null, "more": 1}\n')
    assert read_questions(path) == [Asked("A?", "a.md"), Asked("B?", None), Asked("C?", None)]
    for line in ("x", "[1]", "3", "{}", '{"question": 3}', '{"question": " "}', '{"question": "A?", "source": 4}', "[" * 3000):
        path.write_text('{"question": "A?"}\n' + line)
        with pytest.raises(DataError, match="line 2 of"):
            read_questions(path)
    path.write_bytes(b"\xff")
    for broken in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="cannot be read"):
            read_questions(broken)


def test_too_few_questions_and_unknown_documents_are_told(birds: Retriever) -> None:
    with pytest.raises(DataError, match="5 questions have a source"):
        learn(birds, ASKED[:5], 0.02, lambda *_: None)
    with pytest.raises(DataError, match="question is empty|surrogate|Unicode"):
        learn(birds, [*ASKED, Asked("\ud800", None)], 0.02, lambda *_: None)
    with pytest.raises(DataError, match="'dodo.md'"):
        learn(birds, [*ASKED, Asked("Where is the dodo?", "dodo.md")], 0.02, lambda *_: None)


@pytest.mark.usefixtures("birds")
def test_the_command_learns_and_says_what_it_costs(tmp_path: Path, index_folder: Path) -> None:
    from typer.testing import CliRunner

    from labs.cli import app

    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": a.text, "source": a.source}) + "\n" for a in ASKED))
    done = CliRunner().invoke(app, ["index", "calibrate", "birds", "--questions", str(path), "--at-most", "0.1"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["refused"] <= 0.1 and told["answerable"] == len(BIRDS)
    assert json.loads((index_folder / "birds" / abstention.FILE).read_text())["value"] == told["threshold"]


def test_a_share_counts_rare_words_more_and_each_once() -> None:
    words = Lexical.of(["the red fox", "the old fox", "the sea"], "english")
    rare = words.rarity(["the", "foxes", "red", "unseen", "?!"])
    assert list(rare) == sorted(rare[:4]) + [0.0]
    both, one, none = words.shares("The fox the red fox?", [0, 1, 2])
    assert both == pytest.approx(1.0) and one == pytest.approx((rare[0] + rare[1]) / (rare[0] + rare[1] + rare[2]))
    assert none == pytest.approx(rare[0] / (rare[0] + rare[1] + rare[2]))
    assert list(words.shares("", [0, 1])) == [0, 0] and words.shares("fox", []).shape == (0,)
