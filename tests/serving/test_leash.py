"""The leash alone: whatever ends first, nothing of the command is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving.supervisor import LEASH
from tests.serving.conftest import descendants, gone, wait_until

PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); time.sleep(99)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"

SEGFAULT = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def leashed(code: str, grace: float = 5.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", str(LEASH), str(grace), sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def close(leash: subprocess.Popen[bytes]) -> int:
    for stream in (leash.stdin, leash.stdout):
        if stream:
            stream.close()
    return leash.wait(20)


def family(leash: subprocess.Popen[bytes], size: int) -> list[psutil.Process]:
    return wait_until(lambda: found if len(found := descendants(leash.pid)) == size else None)


def test_children_of_the_command_go_too() -> None:
    leash = leashed(PARENT)
    processes = family(leash, 2)
    close(leash)
    assert wait_until(lambda: gone(processes))


def test_a_command_that_ignores_sigterm_is_killed() -> None:
    leash = leashed(STUBBORN, grace=0.2)
    assert leash.stdout and leash.stdout.readline() == b"on\n"
    processes = family(leash, 1)
    assert close(leash) == 128 + signal.SIGKILL
    assert gone(processes)


def test_sigterm_ends_everything() -> None:
    leash = leashed(PARENT)
    processes = family(leash, 2)
    leash.terminate()
    leash.wait(20)
    close(leash)
    assert wait_until(lambda: gone(processes))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_leash_takes_the_command_along() -> None:
    leash = leashed("import time; time.sleep(99)")
    processes = family(leash, 1)
    leash.kill()
    close(leash)
    assert wait_until(lambda: gone(processes))


def test_the_status_is_the_commands(tmp_path: Path) -> None:
    for code, status in (("raise SystemExit(7)", 7), (SEGFAULT, 128 + signal.SIGSEGV)):
        leash = leashed(code)
        assert leash.wait(20) == status
        close(leash)
    command = [sys.executable, "-I", str(LEASH), "1", str(tmp_path / "missing")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    assert done.returncode != 0
