"""The comparison of searches: in earnest, on made vectors few enough for every run of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from labs.bench import xquad
from labs.bench.rag_ann import APPROXIMATE, made_vectors
from labs.bench.rag_sets import of_one
from pipelines.config import ROOT

NO_DATA = pytest.mark.skipif(
    not (xquad.data_folder() / xquad.FILE).is_file(), reason="no XQuAD file; LLMLAB_DATA names its folder"
)


@NO_DATA
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_measures_quality_and_cost() -> None:
    done = subprocess.run([sys.executable, "-m", "labs", "bench", "rag", "--vectors", "20000"], cwd=ROOT, env=os.environ,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert document["hybrid_worst_gap"] <= 0.005 and document["hybrid_mean_gain"] > 0
    assert document["recall"]["xquad_test"]["hybrid"]["recall_at_1"] >= 0.95
    assert document["retrieve_ratio_to_raw"] < 1.15
    assert document["bm25_ratio_to_rank_bm25"] > 10
    for kind in APPROXIMATE:
        assert document["ann"]["20000"][kind]["recall_at_10"] >= 0.97


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
