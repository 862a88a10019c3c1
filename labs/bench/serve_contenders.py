"""The servers of `llmlab bench serve`, each in a process of its own on loopback, gone when its block ends.

    engine              llama.cpp, the very process that answers behind the gateway, asked directly
    gateway             `llmlab serve`, base only, with an index of some pages of labs/knowledge
    transformers_serve  the server that comes with transformers, in float32, as it is by default
    vllm                vLLM from `.venv-vllm`

llama.cpp has the weights in the catalogue's quantisation, the others in 32 bits; all were made from the same.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labs.bench.serve_load import Target
from pipelines import catalogue
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.errors import EngineError
from pipelines.hardware import OPENMP_ENVIRONMENT, probe, vllm_is_installed

if TYPE_CHECKING:
    import psutil

    from serving.engines.contract import Engine, Launch

ENGINE, GATEWAY, TRANSFORMERS, VLLM = "engine", "gateway", "transformers_serve", "vllm"
HOST = "127.0.0.1"
START_SECONDS, GRACE_SECONDS = 300.0, 20.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Served:
    """A gateway and its engine.

    Attributes:
        gateway: the gateway as a target.
        engine: the engine behind it as one.
        process: of the gateway; the engine is among its children.
        slots: sequences that the engine generates at once.
    """

    gateway: Target
    engine: Target
    process: psutil.Process
    slots: int


def missing(name: str, *, quick: bool) -> str | None:
    """Return why a contender cannot take part and what to do about it, or None."""
    if name == TRANSFORMERS and importlib.util.find_spec("openai") is None:
        return "it wants the openai package: make setup-chains"
    if name == VLLM and not vllm_is_installed():
        return "make setup-vllm"
    return "it starts for more than a minute: without --quick" if name == VLLM and quick else None


@contextmanager
def gateway(model: str, index: Path, log: Path, settings: Sequence[str] = ()) -> Iterator[Served]:
    """Serve a model and an index as `llmlab serve` does.

    Args:
        model: a catalogue entry.
        index: the folder of indexes; the one named "knowledge" is served.
        log: the server's lines.
        settings: as for --set.
    """
    from serving.address import check_free
    from serving.settings import load_serve_config
    from serving.sizes import sizes_of

    port, engine_port = (check_free(HOST, 0, "") for _ in range(2))
    given = [f"port={port}", f"engine_port={engine_port}", "engine=llamacpp", "index=knowledge", "keys=null", *settings]
    slots = sizes_of(catalogue.runnable(model), load_serve_config("default", given), "llamacpp", probe()).slots
    command = [sys.executable, "-m", "labs", "serve", model, "--adapter", "none", *(part for s in given for part in ("--set", s))]
    url = f"http://{HOST}:{port}"
    with _process(command, {"LLMLAB_INDEX": str(index)}, log, f"{url}/readyz") as process:
        yield Served(Target(url, model), Target(f"http://{HOST}:{engine_port}", model), process, slots)


@contextmanager
def transformers_serve(model: Model, log: Path) -> Iterator[Target]:
    """Serve a model by `transformers serve`; in float32, since bfloat16 is emulated on most CPUs."""
    from pipelines.weights import hf_directory
    from serving.address import check_free

    folder, port = str(hf_directory(model)), check_free(HOST, 0, "")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--host", HOST, "--port", str(port),
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    with _process(command, {"HF_HUB_OFFLINE": "1"}, log, f"http://{HOST}:{port}/health"):
        yield Target(f"http://{HOST}:{port}", folder, usage=False)


@contextmanager
def vllm(model: Model, work: Path) -> Iterator[Target]:
    """Serve a model by vLLM, started as the gateway would start it."""
    from serving.engines.vllm import Vllm, weight_bytes
    from serving.settings import load_serve_config
    from serving.sizes import sizes_of

    engine = Vllm()
    base = engine.base_path(model, False, print)
    sizes = sizes_of(model, load_serve_config(), engine.name, probe(), weight_bytes(base))
    with alone(engine, model.name, base, work, sizes.context_tokens, sizes.slots) as launch:
        yield Target(launch.url, model.name)


@contextmanager
def alone(
    engine: Engine, name: str, base: Path, work: Path, context_tokens: int, slots: int, *, speculation: bool = False
) -> Iterator[Launch]:
    """Run an engine as the gateway would, without one; the arguments are those of `serving.engines.contract.Launch`."""
    from serving.address import check_free
    from serving.engines.contract import Launch
    from serving.settings import load_serve_config
    from serving.supervisor import Supervisor

    config, machine, port = load_serve_config(), probe(), check_free(HOST, 0, "")
    gpu = engine.name == VLLM and bool(machine.gpus)
    launch = Launch(name, base, (), HOST, port, context_tokens, slots, machine.cpus, gpu, work, speculation=speculation)
    supervisor = Supervisor(engine, launch, config.startup_seconds, config.restart)
    try:
        supervisor.spawn()
        supervisor.await_health()
        yield launch
    finally:
        supervisor.stop()


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str], log: Path, ready: str) -> Iterator[psutil.Process]:
    """Run a server under a leash until the block ends, and yield its process once it is ready."""
    import psutil

    from serving.supervisor import LEASH

    leashed = [sys.executable, "-I", str(LEASH), str(GRACE_SECONDS), *command]
    own = os.environ | OPENMP_ENVIRONMENT | {"PYTHONPATH": str(ROOT), **environment}
    with log.open("wb") as lines:
        leash = subprocess.Popen(leashed, stdin=subprocess.PIPE, stdout=lines, stderr=lines, env=own, cwd=ROOT,
                                 start_new_session=True)  # fmt: skip
    try:
        _await(ready, leash, log)
        yield psutil.Process(leash.pid).children()[0]
    finally:
        assert leash.stdin
        leash.stdin.close()  # lets the leash go
        leash.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until an address answers with 200.

    Raises:
        EngineError: the process ended, or took too long; carries the end of its log.
    """
    import httpx

    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if http.get(url).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(POLL_SECONDS)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
    raise EngineError(f"a server of the comparison did not start; its last lines:\n{tail}", f"200 from {url}", "make doctor")
