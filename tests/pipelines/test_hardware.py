"""What the machine says of itself."""

from __future__ import annotations

import subprocess
import sys

from pipelines.config import ROOT

PARENT = """
import subprocess, sys
held = bytearray(b"x" * 400_000_000)
child = "from pipelines.hardware import peak_resident_bytes; print(peak_resident_bytes())"
subprocess.run([sys.executable, "-c", child], check=True)
"""


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < 200_000_000
