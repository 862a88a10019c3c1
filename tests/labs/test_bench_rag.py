"""The comparison of searches: in earnest, on made vectors few enough for every run of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from labs.bench import xquad
from labs.bench.rag_ann import APPROXIMATE, DIMENSION, made_vectors, resident_bytes
from labs.bench.rag_langchain import faiss_search
from labs.bench.rag_options import joined_questions
from labs.bench.rag_sets import Asked, Set, of_one
from pipelines.config import ROOT, load, named
from pipelines.rag.chunk import passage
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from pipelines.rag.vectors import serialised

NO_DATA = pytest.mark.skipif(
    not (xquad.data_folder() / xquad.FILE).is_file(), reason="no XQuAD file; LLMLAB_DATA names its folder"
)


@NO_DATA
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_bench_measures_quality_and_cost() -> None:
    done = subprocess.run([sys.executable, "-m", "labs", "bench", "rag", "--vectors", "20000"], cwd=ROOT, env=os.environ,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert document["hybrid_worst_gap"] <= 0.005 and document["hybrid_mean_gain"] > 0
    assert document["recall"]["xquad_test"]["hybrid"]["recall_at_1"] >= 0.95
    assert document["rerank_recall_at_1"]["xquad_test"] >= 0.95
    options = document["options"]
    plain = options["as configured"]
    assert options["reranker=maxsim"]["recall_at_1"] > plain["recall_at_1"]
    assert options["neighbours=1"]["answer_shown"] > plain["answer_shown"]
    assert options["diversity=0.3"]["paragraphs_among_5"] > plain["paragraphs_among_5"]
    assert options["split_questions=true"]["both_among_4"] > plain["both_among_4"]
    assert document["retrieve_ratio_to_raw"] < 1.15
    assert document["bm25_ratio_to_rank_bm25"] > 10
    for kind in APPROXIMATE:
        found = document["ann"]["20000"][kind]
        assert found["recall_at_10"] >= 0.97
        assert found["memory_bytes"] >= 0.9 * 20000 * found["bytes_per_vector"]
    assert 0 < document["retrieve_ratio_to_langchain"] < 1.5


def test_two_questions_become_one_that_can_be_taken_apart() -> None:
    texts = ["Who made A?", "Who made B?", "Who made C?", "When was D made?", "Is E there?", "What did F do?"]
    asked = tuple(Asked(text, frozenset({str(n % 4)})) for n, text in enumerate(texts))
    both = joined_questions(Set("made", None, asked, lambda chunk: chunk.id))  # type: ignore[arg-type]
    assert both == [("Who made A and when was D made?", asked[0].right, asked[3].right),
                    ("Who made C and what did F do?", asked[2].right, asked[5].right)]  # fmt: skip


def test_scores_of_a_ranking_are_those_of_their_definitions() -> None:
    assert of_one(["b", "a"], frozenset("a")) == {
        "recall_at_1": 0, "recall_at_5": 1, "recall_at_10": 1, "mrr": 0.5, "ndcg_at_10": pytest.approx(1 / np.log2(3)),
    }  # fmt: skip
    both = of_one(["a", "x", "b"], frozenset("ab"))
    assert both["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)))
    assert set(of_one(["x"] * 50, frozenset("a")).values()) == {0.0}


def test_made_vectors_are_of_length_one_and_repeat() -> None:
    rows = made_vectors(1200)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(rows, made_vectors(1200))


def test_the_memory_of_an_index_is_that_of_a_process_that_reads_it() -> None:
    rows = made_vectors(20_000)
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(rows)
    content = serialised(flat)
    assert len(content) > 20_000 * DIMENSION * 4
    assert 0.95 * len(content) < resident_bytes(content) < 1.3 * len(content)


def test_langchain_finds_the_same_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_community", exc_type=ImportError)
    monkeypatch.setenv("LLMLAB_INDEX", str(tmp_path / "index"))
    (tmp_path / "docs").mkdir()
    for number, name in enumerate(("sun", "moon", "tide", "comet", "star")):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"The {name} is number {number} of five.")
    config, embedder = load(named("rag", "default"), RagConfig, ["dense_weight=1"]), load_embedder("minilm")
    sync(tmp_path / "docs", "sky", config, embedder)
    retriever = Retriever(open_index("sky", embedder), embedder, config)
    for question in ("What is the moon?", "Which one is number four?"):
        ours = [passage(hit.title, hit.text) for hit in retriever.retrieve(question, 3).hits]
        assert faiss_search(retriever)(question, 3) == ours
