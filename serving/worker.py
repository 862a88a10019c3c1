"""One gateway process of several; `serving.workers` starts it with a `Job` on its standard input, and tells it the news there.

It opens the index, answers requests, and ends when it is asked to or when the process that started it is gone. It starts no
engine. prometheus_client is in its multiprocess mode here, since the environment names a folder for it.

    python -m serving.worker
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from monitoring.workers import VARIABLE
from pipelines.errors import LabError
from serving import engines
from serving.access import Access
from serving.crew import Crew, Job, News
from serving.keys import key_path
from serving.knowledge import open_knowledge
from serving.launch import WORK, launch_of, model_of, server_of, service_of, stopped_by_signals
from serving.logs import written
from serving.rates import Rates
from serving.service import Service
from serving.supervisor import Supervisor
from serving.tuned import choose
from serving.workers import READY


def main() -> int:
    """Serve until the end of the standard input or a signal; return the exit status."""
    ready, quiet = os.dup(1), "(Removal of|Clearing) labels"  # what is cleared is not read from the files: monitoring.workers
    os.dup2(2, 1)  # nothing but the word goes to the process that waits for it
    warnings.filterwarnings("ignore", quiet, UserWarning)
    lines = os.fdopen(os.dup(0), encoding="utf-8")  # the interpreter cannot end while a thread reads from sys.stdin itself
    try:
        with stopped_by_signals():
            job = Job.model_validate_json(lines.readline())
            with written(job.config.log), ExitStack() as stack:
                _serve(_service(job, lines, stack), socket.socket(fileno=job.socket), ready)
    except KeyboardInterrupt:
        return 0
    except LabError as error:
        sys.stderr.write(f"gateway worker: {error}\n")
        return error.exit_status
    return 0


def _service(job: Job, lines: TextIO, stack: ExitStack) -> Service:
    config = job.share
    model = model_of(job.model, job.engine, config)
    chosen = choose(model, job.adapters)
    launch = launch_of(model, config, job.engine, chosen, job.engine_port, False, lambda _: None)
    kept_elsewhere = Supervisor(engines.named(job.engine), launch, config.startup_seconds, config.restart, serves=False)
    access = Access(key_path(config.keys), config.host, Rates(WORK / "spent.sqlite"))
    stack.callback(access.rates.close)
    knowledge = open_knowledge(config.index, config.rag)
    news = News.model_validate_json(lines.readline())
    crew = Crew(config.workers, Path(os.environ[VARIABLE]), news, kept_elsewhere)
    threading.Thread(target=_listen, args=(crew, lines), name="news", daemon=True).start()
    return service_of(model, config, chosen, kept_elsewhere, knowledge, access, crew)


def _listen(crew: Crew, lines: TextIO) -> None:
    """Take the news; their end is the end of the process that started this one, and so of this one."""
    try:
        crew.listen(lines)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _serve(service: Service, address: socket.socket, ready: int) -> None:
    server = server_of(service)
    server.on_started = lambda: os.write(ready, READY)
    server.run(sockets=[address])


if __name__ == "__main__":
    sys.exit(main())
