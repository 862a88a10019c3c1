"""Several gateway processes on one port: start them, tell them how the engine is, start one that died again, and stop all.

They accept from one socket, so that one that dies takes no waiting connection with it. Their metrics are in a folder that is made
for this start and removed at its end; a later start removes what a killed one left. The engine is kept by this process, which
answers no request itself. What a worker does is in `serving.worker`; how metrics are added up in `monitoring.workers`.

    llmlab serve --set workers=2
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from monitoring.workers import VARIABLE, engine_exposition, forget_gauges
from pipelines.config import ROOT
from pipelines.errors import EngineError
from serving.crew import Job, News
from serving.supervisor import Supervisor

TURN_SECONDS = 0.1  # between two looks at workers and engine
GRACE_SECONDS = 10.0  # after the drain, until a worker is killed
READY = b"ready\n"
FOLDER = "metrics-"


@dataclass
class _Worker:
    """One place in the crew, and the process that has it.

    Attributes:
        told: the newest news that it has.
        cpu_seconds: that it has used, as of the last look.
        failures: times in a row that it ended early.
        again_at: when to start it again (`time.monotonic`).
    """

    number: int
    process: subprocess.Popen[bytes]
    began: float
    told: str = ""
    cpu_seconds: float = 0.0
    failures: int = 0
    again_at: float = 0.0


class Workers:
    """As many workers as the configuration says, for the length of the block.

    Args:
        job: what they serve.
        address: the socket that they accept from.
        supervisor: keeps the engine.
        work: where the folder of their metrics is made.
    """

    def __init__(self, job: Job, address: socket.socket, supervisor: Supervisor, work: Path) -> None:
        self.job, self.address, self.supervisor = job, address, supervisor
        work.mkdir(parents=True, exist_ok=True)
        _remove_left(work)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=work))
        self._workers: list[_Worker] = []
        self._spent_seconds = 0.0

    def __enter__(self) -> Workers:
        """Start all and wait until they accept requests; `EngineError` if one does not."""
        try:
            self._workers = [self._started(number) for number in range(self.job.config.workers)]
            self._tell()
            for worker in self._workers:
                assert worker.process.stdout
                if worker.process.stdout.readline() != READY:
                    came = f"gateway worker {worker.number} did not start; what it said stands above"
                    raise EngineError(came, "a worker that runs", "llmlab serve --set workers=1")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let each end what it has under way, within the drain time; a second Ctrl-C ends them at once."""
        self._stop()

    def keep(self, stopping: Callable[[], bool]) -> None:
        """Tell them the news and start again who dies, until a signal comes."""
        while not stopping():
            for worker in self._workers:
                self._look_after(worker)
            self._tell()
            time.sleep(TURN_SECONDS)

    def _started(self, number: int) -> _Worker:
        job = self.job.model_copy(update={"number": number, "socket": self.address.fileno()})
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=os.environ | {VARIABLE: str(self.folder), "PYTHONPATH": path}, pass_fds=[self.address.fileno()],
            start_new_session=True,  # a Ctrl-C is for this process, which passes it on
        )  # fmt: skip
        _send(process, job.model_dump_json())
        return _Worker(number, process, time.monotonic())

    def _look_after(self, worker: _Worker) -> None:
        """Bury a worker that died, and start it again after a pause that grows while it dies early."""
        if worker.again_at:
            if time.monotonic() >= worker.again_at:
                again = self._started(worker.number)
                worker.process, worker.began, worker.told, worker.again_at = again.process, again.began, "", 0.0
            return
        worker.cpu_seconds = _cpu_seconds(worker.process.pid) or worker.cpu_seconds
        if worker.process.poll() is None:
            return
        _close(worker.process)
        forget_gauges(self.folder, worker.process.pid)
        self._spent_seconds += worker.cpu_seconds
        restart, lived = self.job.config.restart, time.monotonic() - worker.began
        worker.failures = 1 if lived > restart.settled_seconds else worker.failures + 1
        delay = min(restart.first_delay_seconds * 2.0 ** min(worker.failures - 1, 30), restart.max_delay_seconds)
        worker.cpu_seconds, worker.again_at = 0.0, time.monotonic() + delay

    def _tell(self) -> None:
        """Send the news to everybody who does not have them yet."""
        status = self.supervisor.status
        living = [worker for worker in self._workers if not worker.again_at]
        pids = (os.getpid(), *(worker.process.pid for worker in living))
        news = News(
            **status._asdict(), pids=pids, spent_seconds=self._spent_seconds, engine=engine_exposition()
        ).model_dump_json()
        for worker in living:
            if worker.told != news:
                _send(worker.process, news)
                worker.told = news

    def _stop(self) -> None:
        try:
            self._end(self.job.config.drain_seconds + GRACE_SECONDS)
        except KeyboardInterrupt:
            self._end(GRACE_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, seconds: float) -> None:
        """Ask every worker to end, and kill those that have not after so many seconds."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            _close(worker.process)


def _send(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin
    try:
        process.stdin.write(line.encode() + b"\n")
    except OSError:  # it died, which is seen at the next look
        pass


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, which is known until it is waited for; 0 if it is gone."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _remove_left(work: Path) -> None:
    """Remove the folders of starts that were killed."""
    import psutil

    for left in work.glob(f"{FOLDER}*"):
        owner = left.name.removeprefix(FOLDER).partition("-")[0]
        if not (owner.isdecimal() and psutil.pid_exists(int(owner))):
            shutil.rmtree(left, ignore_errors=True)
