"""A server of somebody else's that runs as our child process: find it, start it on loopback, wait for it, stop it.

It knows nothing of what the server does; `prometheus_server`, `alertmanager_server` and `grafana_server` build the command lines.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

STOP_SECONDS = 10
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ProgramMissing(RuntimeError):
    """A program was not found; the message says where it was looked for and how to get it."""


class ProgramFailed(RuntimeError):
    """A server ended, or was not ready in time; the message holds the end of its log."""


def find(names: Sequence[str], variable: str, package: str, given: str | Path | None = None) -> Path:
    """Return a program: `given`, else what the environment variable names, else the first of `names` on PATH or in /usr/bin.

    Raises:
        ProgramMissing: there is none, or the one that was named does not exist; one that was named is never replaced.
    """
    fix = f"install it (apt-get install {package}) or set {variable}=/path/to/{names[0]}"
    named = given or os.environ.get(variable)
    if named:
        found = shutil.which(named)
        if found is None:
            raise ProgramMissing(f"{named} was named as the {names[0]} binary, but is no executable; {fix}")
        return Path(found)
    for name in names:
        found = shutil.which(name) or shutil.which(f"/usr/bin/{name}")
        if found:
            return Path(found)
    raise ProgramMissing(f"no {names[0]} binary in ${variable}, on PATH or at /usr/bin/{names[0]}; {fix}")


class ChildServer:
    """A child process that answers over HTTP; use it as a context manager.

    Args:
        name: for messages.
        command: its command line.
        listen: host:port of its page.
        ready_path: answers with 200 once it is ready.
        log: file of its output.
        environment: variables on top of ours.
        ready_timeout_seconds: how long it may take to get ready.

    Raises:
        ProgramFailed: on entry, when it cannot start.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        listen: str,
        ready_path: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        ready_timeout_seconds: float = 30.0,
    ) -> None:
        """Keep what is needed; nothing is started yet."""
        self.name, self.command, self.url, self.log = name, list(command), f"http://{listen}", log
        self._listen, self._ready_path = listen, ready_path
        self._environment = dict(environment or {})
        self._ready_timeout_seconds = ready_timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return the id of the process, None while it does not run."""
        return self._process.pid if self._process else None

    def __enter__(self) -> ChildServer:
        """Start the server and return when it is ready."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the server, whatever happened."""
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        self._require_free()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            environment = os.environ | self._environment
            self._process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self._wait_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Block until the server ends by itself; return its exit status."""
        if self._process is None:
            raise ProgramFailed(f"{self.name} was not started")
        return self._process.wait()

    def stop(self) -> None:
        """Ask the server to end, and insist after some seconds; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._ready_timeout_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ProgramFailed(f"{self.name} ended with status {process.returncode}:\n{self._log_end()}")
            if answers(f"{self.url}{self._ready_path}"):
                return
            time.sleep(0.05)
        seconds = self._ready_timeout_seconds
        raise ProgramFailed(f"{self.name} was not ready after {seconds:g} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    def _require_free(self) -> None:
        """Refuse an address in use, where another server would be taken for ours."""
        host, _, port = self._listen.rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise ProgramFailed(f"{self.name} cannot listen on {self._listen}: {error.strerror}") from error


def answers(url: str) -> bool:
    """Return whether a page of this machine answers with 200."""
    try:
        with _LOOPBACK.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
