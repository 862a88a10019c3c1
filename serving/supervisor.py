"""One engine process: start it, wait for its health, start it again when it dies, and leave nothing behind.

It knows processes and time, and nothing of requests. The gateway reads `status`, which is replaced whole, so no lock is
needed. The engine runs under `serving.leash` and writes to `engine.log` in the launch's working directory.

An engine that fails again and again would take the machine's time for nothing: after some failures in a row the circuit opens, it
is left alone for a while, then tried once; if that fails, the next pause begins.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from monitoring.metrics import ENGINE_CIRCUIT_OPEN, ENGINE_RESTARTS, ENGINE_UP
from pipelines.errors import EngineError
from serving.engines.contract import Engine, Launch
from serving.settings import Restart

if TYPE_CHECKING:
    import httpx

LEASH = Path(__file__).with_name("leash.py")
GRACE_SECONDS = 8.0
HEALTH_POLL_SECONDS = 0.1
LOG_TAIL_LINES = 15


class Status(NamedTuple):
    """Whether the engine answers; if not, why, and when it may (`time.monotonic`)."""

    up: bool
    reason: str
    expected_at: float

    @property
    def retry_after_seconds(self) -> int:
        """Return in how many seconds from now to ask again, at least one."""
        return max(1, math.ceil(self.expected_at - time.monotonic()))


class Supervisor:
    """Keeps one engine running: `spawn`, `await_health`, then `watch` until `stop`.

    While two engines run, one takes over from the other; only the one with `serves` set is what the metrics tell of.
    """

    def __init__(self, engine: Engine, launch: Launch, startup_seconds: float, restart: Restart, *, serves: bool = True) -> None:
        self.engine, self.launch = engine, launch
        self.startup_seconds, self.restart = startup_seconds, restart
        self.log = launch.work / "engine.log"
        self.status = Status(False, f"{engine.name} is not started", 0.0)
        self.serves = serves
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._spawned = self._healthy_since = 0.0
        self._start_seconds = 1.0

    def spawn(self) -> None:
        """Start the process; it is not ready yet."""
        self.launch.work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", str(LEASH), str(GRACE_SECONDS), *self.engine.command(self.launch)]
        environment = os.environ | self.engine.environment(self.launch)
        mode = "ab" if self._watcher else "wb"
        with self.log.open(mode) as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                                             cwd=self.launch.work, start_new_session=True)  # fmt: skip
        self._spawned = time.monotonic()
        self._say_down(f"{self.engine.name} is starting")

    def await_health(self) -> None:
        """Wait until the engine answers.

        Raises:
            EngineError: it ended, or did not answer in time; carries the end of its log.
        """
        import httpx

        deadline = time.monotonic() + self.startup_seconds
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            while not self._answers(client):
                self._check_alive()
                if time.monotonic() > deadline:
                    raise self._failure(f"{self.engine.name} did not answer within {self.startup_seconds:g} s")
                if self._stopping.wait(HEALTH_POLL_SECONDS):
                    raise EngineError(f"{self.engine.name} was stopped while it started")
        self._healthy_since = time.monotonic()
        self._start_seconds = self._healthy_since - self._spawned
        self._set(Status(True, f"{self.engine.name} is ready", 0.0))

    def watch(self) -> None:
        """From now on, start the engine again whenever it ends."""
        self._watcher = threading.Thread(target=self._keep_running, name="engine-watch", daemon=True)
        self._watcher.start()

    def take_over(self, other: Supervisor) -> None:
        """Be the one that the metrics tell of, in the place of another."""
        other.serves, self.serves = False, True
        self._set(self.status)

    def memory_bytes(self) -> int:
        """Return the memory that would be free without the engine: what its processes share with nobody."""
        import psutil

        assert self._process is not None
        try:
            processes = psutil.Process(self._process.pid).children(recursive=True)
            return sum(int(process.memory_full_info().uss) for process in processes)
        except psutil.Error:
            return 0

    def cpu_seconds(self) -> float:
        """Return the time that processors have spent on the engine so far, which others on the machine lengthen little.

        Raises:
            EngineError: the engine has ended.
        """
        import psutil

        assert self._process is not None
        try:
            times = [process.cpu_times() for process in psutil.Process(self._process.pid).children(recursive=True)]
        except psutil.Error:
            raise EngineError("the engine ended while it was measured", "one that runs", "look at its log") from None
        return float(sum(t.user + t.system for t in times))

    def stop(self) -> None:
        """End the engine and everything it started; safe to call at any time, and twice."""
        self._stopping.set()
        self._end_process()
        if self._watcher:
            self._watcher.join()
        self._end_process()  # the watcher may have been starting a new one
        self._set(Status(False, f"{self.engine.name} is stopped", 0.0))

    def log_tail(self) -> str:
        """Return the last lines of the engine's log."""
        lines = self._log_text().splitlines() or ["(no log)"]
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])

    def _log_text(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _keep_running(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            reason = self._wait_for_end()
            settled = time.monotonic() - self._healthy_since > self.restart.settled_seconds
            failures = 1 if settled else failures + 1
            while not self._stopping.is_set() and not self._recovered(reason, failures):
                reason, failures = f"{self.engine.name} could not be started again, see {self.log}", failures + 1

    def _wait_for_end(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        self._end_process()
        name = f" ({signal.Signals(status - 128).name})" if status - 128 in set(signal.Signals) else ""
        return f"{self.engine.name} ended with status {status}{name}"

    def _recovered(self, reason: str, failures: int) -> bool:
        """Wait out the delay, start the engine and wait for its health; return True if that worked."""
        opened = failures >= self.restart.open_after_failures
        delay = self.restart.open_seconds if opened else self._delay(failures)
        ENGINE_CIRCUIT_OPEN.labels(engine=self.engine.name).set(float(opened))
        count = f"it failed {failures} times in a row and is left alone for {delay:g} s"
        self._say_down(f"{reason}; {count if opened else 'it is being started again'}", delay)
        if self._stopping.wait(delay):
            return False
        ENGINE_RESTARTS.labels(engine=self.engine.name).inc()
        try:
            self.spawn()
            self._say_down(f"{reason}; it is starting again")
            self.await_health()
        except (EngineError, OSError):
            self._end_process()
            return False
        ENGINE_CIRCUIT_OPEN.labels(engine=self.engine.name).set(0)
        return True

    def _delay(self, failures: int) -> float:
        return min(self.restart.first_delay_seconds * 2.0 ** min(failures - 1, 30), self.restart.max_delay_seconds)

    def _say_down(self, reason: str, delay: float = 0.0) -> None:
        """Show that the engine is down, until it has been started after `delay` seconds, as fast as the last time."""
        self._set(Status(False, reason, time.monotonic() + delay + self._start_seconds))

    def _answers(self, client: httpx.Client) -> bool:
        import httpx

        try:
            return client.get(self.launch.url + self.engine.health_path).status_code == 200
        except httpx.HTTPError:
            return False

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise self._failure(f"{self.engine.name} ended while it started")

    def _failure(self, came: str) -> EngineError:
        log = self._log_text()
        known = self.engine.trouble(log)
        if known:
            return EngineError(f"{came}: {known.came} (all of it: {self.log})", known.expected, known.next_command)
        return EngineError(
            f"{came}; the end of {self.log}:\n{self.log_tail()}", "an engine that answers its health check", "make doctor"
        )

    def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin:
            process.stdin.close()  # lets the leash go
        try:
            process.wait(GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _set(self, status: Status) -> None:
        self.status = status
        if self.serves:
            ENGINE_UP.labels(engine=self.engine.name).set(float(status.up))
