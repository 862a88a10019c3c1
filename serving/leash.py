"""A leash for one command: when the gateway goes, however it goes, the command and all that it started go too.

The gateway holds the other end of this process's standard input. When that closes, or on SIGTERM, the command gets
SIGTERM and, after a grace time, its whole process group gets SIGKILL. Standard library only, since it runs isolated:

    python -I serving/leash.py GRACE_SECONDS COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

PR_SET_PDEATHSIG = 1


class LetGo(BaseException):
    """The gateway is gone, or asks for the end."""


def main(grace_seconds: float, command: Sequence[str]) -> int:
    """Run the command to its end or ours; return its exit status, 128 + signal if a signal ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _let_go)
    child = None
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=partial(_die_with, os.getpid())
        )
        threading.Thread(target=_wait_for_gateway, daemon=True).start()
        child.wait()
    except LetGo:
        if child:
            _terminate(child, grace_seconds)
    if child is None:
        return 128 + signal.SIGTERM
    _signal_group(child, signal.SIGKILL)
    status = child.wait()
    return 128 - status if status < 0 else status


def _let_go(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature of a signal handler
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise LetGo


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies; runs in the child, before the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the question was asked
            os._exit(1)


def _wait_for_gateway() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    child.terminate()
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        pass


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):  # nobody is left in it
        pass


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
