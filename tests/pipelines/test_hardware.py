"""What the machine says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import hardware
from pipelines.config import ROOT
from pipelines.hardware import Gpu

PARENT = """
import subprocess, sys
held = bytearray(b"x" * 400_000_000)
child = "from pipelines.hardware import peak_resident_bytes; print(peak_resident_bytes())"
subprocess.run([sys.executable, "-c", child], check=True)
"""


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < 200_000_000


def test_gpus_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA RTX A4000, 16376, 8188, 550.54'\necho 'Odd, name, [N/A], [N/A], 550.54'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    hardware._gpus.cache_clear()
    try:
        first, second = hardware._gpus()
    finally:
        hardware._gpus.cache_clear()
    assert first == Gpu("NVIDIA RTX A4000", 16376 * 2**20, 8188 * 2**20, "550.54")
    assert second == Gpu("Odd, name", 0, 0, "550.54")


def test_a_containers_limit_bounds_the_cores(tmp_path: Path) -> None:
    unlimited = hardware.usable_cpus(tmp_path / "missing")
    for text, expected in (
        ("max 100000\n", unlimited),
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("99900000 100000\n", unlimited),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert hardware.usable_cpus(tmp_path / "cpu.max") == expected
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert hardware.usable_cpus(tmp_path / "cpu.max") == min(2, unlimited)
