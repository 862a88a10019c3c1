"""The demo itself, through make, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 360  # a second run, set-up done, on two cores that nobody else uses


def demo() -> tuple[dict[str, Any], Path]:
    shell = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}  # make in make adds lines
    done = subprocess.run(["make", "demo"], cwd=ROOT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), Path(done.stderr.split("report: ")[1].split()[0])


@pytest.mark.campaign
@pytest.mark.timeout(2400)
def test_the_demo_takes_minutes(report_figure: Callable[[str], None]) -> None:
    result, _ = demo()
    report_figure(f"the demo took {result['total_seconds']:.0f} s: {result['seconds']}")
    assert result["total_seconds"] < SECONDS


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_goes_through_the_whole_life() -> None:
    before = {p.pid for p in psutil.process_iter()}
    result, report = demo()
    assert result["f1_tuned"] > 2 * result["f1_base"]
    assert result["abstention_f1"] > 0.4
    assert len(result["answers"]) == 3 and result["abstained"][-1] is True
    text = report.read_text(encoding="utf-8")
    assert "The full recipe" in text and "What to try next" in text and "llmlab_rag_requests_total" in text
    assert (report.parent / "report.png").read_bytes().startswith(b"\x89PNG")
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and "serving.engines" in " ".join(p.info["cmdline"] or [])
    ]
    assert not left
