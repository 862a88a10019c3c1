"""Many processes read, cut and embed the documents of a sync, by Ray Data; the index is the one that a single process makes.

    files, 8 at a time         ->  actors that read and cut  ->  chunks, as JSON
    new passages, 32 at a time ->  actors that embed         ->  vectors, float32

What comes back is put where it belongs, whoever was first. Passages go in the embedder's own order, longest first, so that the
same ones share a batch as in one process: vectors in 8 bits depend on that. Files go by their paths: workers on other machines
need the folder, this project and its embedder in the same places. A worker that dies ends the sync; the index stays as it was.

Ray moves code and work between its own processes by cloudpickle, so who can talk to it can run code. A Ray that is started here
listens on loopback only, wants a token that is made for it, sends no usage statistics, and ends with the sync, also after Ctrl-C;
only kill -9 leaves two idle processes of it, and its folder in /tmp. A cluster, named by RAY_ADDRESS, is as safe as whoever runs
it has made it.
Run: make index DOCS=path/to/folder ENGINE=ray WORKERS=2
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError, FingerprintMismatch, LabError
from pipelines.hardware import probe
from pipelines.rag.chunk import Chunk
from pipelines.rag.embed import Embedder, load_counter, load_embedder
from pipelines.rag.generation import Progress
from pipelines.rag.load import READERS_VERSION, File, Skipped
from pipelines.rag.workers import Cut, cut

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SETUP = "make setup-ray"
FILES_AT_ONCE = 8
PASSAGES_AT_ONCE = 32  # a multiple of what the embedders take at once, so that their batches stay the same
OBJECT_STORE_BYTES = 150 * 2**20  # what does not fit is kept on disk
REACHING_SECONDS, ENDING_SECONDS = 10, 10
CLUSTER = "a cluster of the same version at RAY_ADDRESS; RAY_AUTH_MODE=token and its token if it asks for one"

_EVERYWHERE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what will be the default, and spares a warning
}
# Ray takes 127.0.0.1 for the address of another interface and listens there, unless it may not be a cluster.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

Work = Callable[[str], bytes]


class RayMissing(ConfigError):
    """Ray is not installed."""


class WorkerFailed(LabError):
    """Ray cannot be started or reached, or a worker of it has died."""


class RayWorkers:
    """Workers of a Ray that runs (pipelines.rag.workers.Workers).

    Args:
        embedder: what this process counts and compares with.
        name: of the embedder, one of pipelines.rag.embed.EMBEDDERS, which each worker loads once.
        count: of the workers.
    """

    def __init__(self, embedder: Embedder, name: str, count: int) -> None:
        self._embedder, self._name, self._count = embedder, name, count

    def cut(self, files: Sequence[File], max_tokens: int, report: Progress) -> list[Cut | Skipped]:
        """Read and cut files; see `Workers`."""
        groups = [files[first : first + FILES_AT_ONCE] for first in range(0, len(files), FILES_AT_ONCE)]
        make = partial(_cutting, self._name, max_tokens, READERS_VERSION)
        found: list[list[Cut | Skipped]] = [[] for _ in groups]
        done = 0
        for place, came in self._each(make, [json.dumps([_sent_file(file) for file in group]) for group in groups]):
            found[place] = [_came_cut(one) for one in json.loads(came)]
            done += len(groups[place])
            report("chunk", done, len(files))
        return [one for group in found for one in group]

    def embed(self, passages: Sequence[str], report: Progress) -> np.ndarray:
        """Embed passages; see `Workers`."""
        import numpy as np

        order = sorted(range(len(passages)), key=lambda row: -self._embedder.token_count(passages[row]))
        groups = [order[first : first + PASSAGES_AT_ONCE] for first in range(0, len(order), PASSAGES_AT_ONCE)]
        make = partial(_embedding, self._name, self._embedder.fingerprint)
        vectors = np.empty((len(passages), self._embedder.dimension), dtype=np.float32)
        done = 0
        for place, came in self._each(make, [json.dumps([passages[row] for row in group]) for group in groups]):
            vectors[groups[place]] = np.frombuffer(came, dtype=np.float32).reshape(-1, self._embedder.dimension)
            done += len(groups[place])
            report("embed", done, len(passages))
        return vectors

    def _each(self, make: Callable[[], Work], sent: Sequence[str]) -> Iterator[tuple[int, bytes]]:
        """Yield place and result of each piece of work, as they come."""
        if not sent:
            return
        import ray.data
        from ray.exceptions import RayError

        rows = [{"place": place, "sent": piece} for place, piece in enumerate(sent)]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor, fn_constructor_args=(make,), batch_size=None, batch_format="pyarrow", num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._count, len(rows))), ray_remote_args_fn=_no_second_life,
        )  # fmt: skip
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise _came_error(row["error"])
                yield row["place"], row["came"]
        except RayError as error:
            raise WorkerFailed(f"a worker of Ray failed: {_last_line(error)}", "workers that live until the end",
                               "the same command again, with fewer --workers if memory ran out") from error  # fmt: skip


@contextmanager
def on_ray(embedder: Embedder, name: str, count: int | None = None) -> Iterator[RayWorkers]:
    """Start Ray on this machine, or connect to the cluster in RAY_ADDRESS, and end that with all its processes afterwards.

    Args:
        embedder: that the index is made with.
        name: of it.
        count: of the workers; None is one for each CPU.

    Raises:
        RayMissing: Ray is not installed.
        ConfigError: the cluster has fewer CPUs than that.
        WorkerFailed: Ray does not start, or the cluster does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if find_spec("ray") is None:
        raise RayMissing("Ray is not installed", "ray[data] in .venv", SETUP)
    _set_environment(local=not address)
    with _quiet(), tempfile.TemporaryDirectory(prefix="llmlab-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            cpus = _start(folder, address, count)
            if count and count > cpus:
                raise ConfigError(f"{count} workers were asked for", f"at most {cpus}, the CPUs of the cluster")
            yield RayWorkers(embedder, name, count or cpus)
        finally:
            _end(folder)


def _set_environment(*, local: bool) -> None:
    """Say how Ray shall be; it reads that when it is imported and when it starts."""
    os.environ |= _EVERYWHERE | (_ON_LOOPBACK if local else {})
    if local and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _start(folder: str, address: str, count: int | None) -> int:
    """Start Ray in a folder, or connect to an address; return the number of its CPUs."""
    import ray
    from ray.exceptions import RayError

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=count or probe().cpus, num_gpus=0, include_dashboard=False,
                     object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder, **quiet)  # fmt: skip
    except (RayError, OSError, RuntimeError, ValueError) as error:
        how, wanted = ("reached", CLUSTER) if address else ("started", "a Ray on this machine")
        raise WorkerFailed(f"Ray cannot be {how}: {_last_line(error)}", wanted) from error
    return int(ray.cluster_resources().get("CPU", 0))


def _check_reachable(address: str) -> None:
    """Raise `OSError` at once if nothing listens at an address; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS is {address!r}", "HOST:PORT of a cluster, or nothing for this machine")
    socket.create_connection((host, int(port)), timeout=REACHING_SECONDS).close()


def _end(folder: str) -> None:
    """End the session, and the processes of a Ray that was started in a folder."""
    import psutil
    import ray

    started = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(folder in part for part in child.cmdline()):
                started += [child, *child.children(recursive=True)]
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=ENDING_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from showing progress and its deprecation warnings, and from keeping the handler of SIGTERM."""
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
            import ray.data
            from ray.util.annotations import RayDeprecationWarning

            warnings.filterwarnings("ignore", category=RayDeprecationWarning)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)


def _no_second_life() -> dict[str, int]:
    """Return what keeps Ray from starting a worker again that a file has killed, for ever."""
    return {"max_restarts": 0, "max_task_retries": 0}


class _Actor:
    """Does one kind of work on each row; errors are results too, for Ray would keep no more than their text."""

    def __init__(self, make: Callable[[], Work]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each CPU
        self._make = make
        self._work: Work | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        import pyarrow as pa

        done = [self._done(sent) for sent in rows["sent"].to_pylist()]
        came, errors = pa.array([d[0] for d in done], pa.large_binary()), pa.array([d[1] for d in done], pa.string())
        return pa.table({"place": rows["place"], "came": came, "error": errors})

    def _done(self, sent: str) -> tuple[bytes, str]:
        try:
            work = self._work = self._work or self._make()
            return work(sent), ""
        except LabError as error:
            return b"", _sent_error(error)


def _cutting(name: str, max_tokens: int, readers_version: int) -> Work:
    """Return what reads and cuts files in a worker."""
    if readers_version != READERS_VERSION:
        raise FingerprintMismatch(f"a worker reads documents in version {READERS_VERSION}", f"version {readers_version}")
    token_count = load_counter(name)

    def work(sent: str) -> bytes:
        found = (cut(_came_file(one), max_tokens, token_count) for one in json.loads(sent))
        return json.dumps([_sent_cut(one) for one in found]).encode()

    return work


def _embedding(name: str, fingerprint: str) -> Work:
    """Return what embeds passages in a worker."""
    embedder = load_embedder(name, threads=1)
    if embedder.fingerprint != fingerprint:
        raise FingerprintMismatch(f"a worker has embedder {embedder.fingerprint[:12]}", f"embedder {fingerprint[:12]}")

    def work(sent: str) -> bytes:
        return embedder.embed(json.loads(sent)).tobytes()

    return work


def _sent_file(file: File) -> dict[str, Any]:
    return {**asdict(file), "root": os.path.abspath(file.root), "path": os.path.abspath(file.path)}


def _came_file(sent: dict[str, Any]) -> File:
    left_out = Skipped(**sent["left_out"]) if sent["left_out"] else None
    return File(Path(sent["root"]), Path(sent["path"]), sent["source"], sent["known"], left_out)


def _sent_cut(one: Cut | Skipped) -> dict[str, Any]:
    if isinstance(one, Skipped):
        return {"skipped": astuple(one)}
    return {"cut": [one.source, one.sha256], "chunks": None if one.chunks is None else [astuple(c) for c in one.chunks]}


def _came_cut(sent: dict[str, Any]) -> Cut | Skipped:
    if "skipped" in sent:
        return Skipped(*sent["skipped"])
    found = Cut(*sent["cut"])
    return found if sent["chunks"] is None else replace(found, chunks=tuple(Chunk(*chunk) for chunk in sent["chunks"]))


def _sent_error(error: LabError) -> str:
    kind = type(error)
    return json.dumps([kind.__module__, kind.__qualname__, error.came, error.expected, error.next_command])


def _came_error(sent: str) -> LabError:
    module, name, *parts = json.loads(sent)
    kind = getattr(import_module(module), name)
    return kind(*parts) if issubclass(kind, LabError) else LabError(*parts)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
