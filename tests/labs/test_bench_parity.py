"""The comparison of quantisations: how replies are compared, what is recommended, and once in earnest, on few prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from labs.bench.parity import ALLOWED_KL, aligned, beginning, recommended
from pipelines.config import ROOT
from tests.conftest import MODEL


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "labs", "bench", "parity", *options], cwd=ROOT, env=os.environ,
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "same"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([5], [5], 1), ([5], [6], 0)]
)
def test_replies_are_the_same_up_to_their_first_difference(one: list[int], other: list[int], same: int) -> None:
    assert beginning(one, other) == beginning(other, one) == same


def test_tokens_that_the_engine_tells_nothing_of_have_no_log_probability() -> None:
    places = [{"id": 5, "logprob": -1.0}, {"id": 5, "logprob": -2.0}, {"id": 9, "logprob": -3.0}]
    np.testing.assert_equal(aligned([5, 7, 8, 5, 9, 4], places), [-1.0, np.nan, np.nan, -2.0, -3.0, np.nan])
    assert np.isnan(aligned([1], [])).all()


def test_the_fastest_of_those_that_lose_little_is_recommended() -> None:
    def form(kl: float, speed: float) -> dict[str, Any]:
        return {"kl_mean": kl, "tokens_per_second": speed}

    forms = {
        "f16": form(0, 50),
        "q8_0": form(ALLOWED_KL, 90),
        "q4_0": form(2 * ALLOWED_KL, 100),
        "vllm": {"tokens_per_second": 500},
    }
    assert recommended(forms) == "q8_0"
    assert recommended({"q4_0": form(0.5, 100), "q4_1": form(0.4, 90)}) == "q4_1"
    assert recommended({"vllm": {"tokens_per_second": 500}}) is None


@pytest.mark.slow
def test_packaged_weights_lose_little_in_the_engine() -> None:
    done = bench(MODEL, "--no-vllm", "--prompts", "1", "--quantisation", "q8_0", "--quantisation", "q4_1")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    eight, four = document["forms"]["q8_0"], document["forms"]["q4_1"]
    assert document["prompts"] == 1 and 1 <= document["places"] <= 3 and "vllm" in document["left_out"]
    assert 0 <= eight["kl_mean"] < 0.05 and 0 <= four["kl_mean"] < 0.5
    assert four["bytes"] < eight["bytes"] < document["reference_bytes"]
    for form in (eight, four):
        assert form["kl_mean"] <= form["kl_worst"]
        assert 0 <= form["equal_tokens"] <= 1 and 0 <= form["equal_replies"] <= 1
        assert form["tokens_per_second"] > 0
    assert document["recommended"] in ("q8_0", "q4_1")
