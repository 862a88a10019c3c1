"""Serving from start to stop: choose the engine and the adapter, check them, start the engine, run the gateway, clean up.

`serve` runs until Ctrl-C; `running` serves for the length of a `with` block. Neither generates anything itself. Run by:

    llmlab serve MODEL [--adapter latest|none|RUN] [--port 8000] [--set engine=llamacpp]
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from monitoring.metrics import set_engine
from pipelines import catalogue
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.errors import ConfigError, EngineError
from pipelines.hardware import Choice, Machine, choose_engine, probe
from pipelines.runs import Run
from serving import engines
from serving.address import check_free, listen
from serving.documents import Documents
from serving.engines.contract import Launch
from serving.knowledge import open_knowledge
from serving.service import Service
from serving.settings import ServeConfig
from serving.supervisor import Supervisor
from serving.tuned import EXPORT, LATEST, adapter_of, check_template, choose_run, exported_base, tuned_name
from serving.upstream import Upstream

if TYPE_CHECKING:
    import uvicorn

Say = Callable[[str], None]
WORK = ROOT / ".cache" / "serve"
ENGINE_HOST = "127.0.0.1"  # the engine has no limits and no authentication: only the gateway talks to it
GPU_RESERVE = 0.03  # of its memory, which vLLM's own start takes before it looks
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Running:
    """A gateway that answers.

    Attributes:
        url: address of the gateway.
        engine_url: address of the engine.
        service: what is served.
    """

    url: str
    engine_url: str
    service: Service


def serve(model_name: str, config: ServeConfig, *, adapter: str = LATEST, pull: bool = False, say: Say) -> None:
    """Serve a model until Ctrl-C or SIGTERM; nothing is left running afterwards.

    Args:
        model_name: a catalogue entry.
        config: addresses, sizes and limits.
        adapter: "latest", "none", or the id of a finetune or export run.
        pull: allow the weights to be fetched if they are not on disk.
        say: receives lines for the user.

    Raises:
        LabError: something does not fit or does not start; the message says what, and what to do.
    """
    try:
        with stopped_by_signals() as asked, _prepared(model_name, config, adapter, pull, say) as (service, server, address):
            if asked():
                raise KeyboardInterrupt
            say("ready; Ctrl-C stops gateway and engine")
            service.supervisor.watch()
            server.run(sockets=[address])
    except KeyboardInterrupt:
        pass
    say("stopped")


@contextmanager
def running(model_name: str, config: ServeConfig, *, adapter: str = LATEST, pull: bool = False, say: Say) -> Iterator[Running]:
    """Serve a model for the length of the block, from a thread of this process; arguments and errors as for `serve`."""
    with _prepared(model_name, config, adapter, pull, say) as (service, server, address):
        service.supervisor.watch()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, name="gateway")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise EngineError("the gateway did not start", "a running gateway", "make doctor")
                time.sleep(0.02)
            yield Running(_url(address), service.supervisor.launch.url, service)
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _prepared(
    model_name: str, config: ServeConfig, adapter: str, pull: bool, say: Say
) -> Iterator[tuple[Service, uvicorn.Server, socket.socket]]:
    """Yield a healthy engine behind a gateway that is ready to run, and stop the engine at the end."""
    model = catalogue.runnable(model_name)
    _check_context(model, config)
    choice = choose_engine(config.engine)
    say(f"engine  {choice.choice}: {choice.reason}")
    run = choose_run(model, adapter)
    say(_about(run, model_name, adapter))
    with listen(config.host, config.port, "--port 8001") as address:
        supervisor = _supervisor(model, config, choice, run, pull, say)
        try:
            supervisor.spawn()
            knowledge = open_knowledge(config.index, config.rag)  # while the engine loads
            say(f"index   {knowledge.summary}")
            supervisor.await_health()
            if run:
                check_template(run, supervisor.engine, supervisor.launch)
            upstream = Upstream(supervisor.engine, supervisor.launch, supervisor, config.request_seconds)
            documents = Documents(knowledge, config)
            service = Service(config, supervisor, upstream, knowledge, documents, run, _base(model, supervisor.launch))
            _say_addresses(_url(address), config.host, service, say)
            yield service, _server(service, config.drain_seconds), address
        finally:
            supervisor.stop()


def _supervisor(model: Model, config: ServeConfig, choice: Choice, run: Run | None, pull: bool, say: Say) -> Supervisor:
    engine, machine = engines.named(choice.choice), probe()
    whole = run if run and run.kind == EXPORT else None
    port = check_free(ENGINE_HOST, config.engine_port, "--set engine_port=8082")
    launch = Launch(
        model=tuned_name(model.name) if whole else model.name,
        base=exported_base(whole, choice.choice) if whole else engine.base_path(model, pull, say),
        adapter=adapter_of(run, model.name) if run and not whole else None,
        host=ENGINE_HOST,
        port=port,
        context_tokens=config.context_tokens,
        slots=getattr(config.slots, choice.choice),
        threads=machine.cpus,
        gpu=bool(machine.gpus) and choice.choice == "vllm",
        work=WORK / f"{choice.choice}-{port}",
        gpu_memory_share=_gpu_memory_share(config, machine),
        speculation=config.speculation,
    )
    set_engine(choice.choice, choice.reason)
    return Supervisor(engine, launch, config.startup_seconds, config.restart)


def _gpu_memory_share(config: ServeConfig, machine: Machine) -> float:
    """Return the wanted share, or, of a GPU that others use too, what is free but for a reserve."""
    free = [gpu.free_memory_bytes / gpu.memory_bytes for gpu in machine.gpus[:1] if gpu.free_memory_bytes]
    return max(0.05, min([config.gpu_memory_share, *(round(share - GPU_RESERVE, 2) for share in free)]))


def _server(service: Service, drain_seconds: int) -> uvicorn.Server:
    import uvicorn

    from serving.gateway import create_app

    app = create_app(service, _version())
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, ws="none",
                                         timeout_graceful_shutdown=drain_seconds))  # fmt: skip


@contextmanager
def stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that the engine is stopped too.

    Yields a function that tells whether a signal came: a library that is being imported may swallow the exception.
    """
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature of a signal handler
        came.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_context(model: Model, config: ServeConfig) -> None:
    longest = model.dimensions.context_tokens if model.dimensions else config.context_tokens
    if config.context_tokens > longest:
        raise ConfigError(f"context_tokens is {config.context_tokens}", f"at most {longest}, which {model.name} was made for",
                          f"--set context_tokens={longest}")  # fmt: skip


def _about(run: Run | None, model: str, adapter: str) -> str:
    if run:
        kind = "export" if run.kind == EXPORT else "adapter"
        return f"{kind} {run.id}, asked for as {tuned_name(model)}" + (
            " (a REHEARSAL, named explicitly)" if run.rehearsal else ""
        )
    return "adapter none: " + ("the base alone was asked for" if adapter != LATEST else f"{model} has no run yet (make finetune)")


def _base(model: Model, launch: Launch) -> dict[str, Any]:
    weights = model.weights
    source = {"hub": weights.hub, "revision": weights.revision} if weights else {}
    return {"title": model.title, "weights": launch.base.name, **source}


def _say_addresses(url: str, host: str, service: Service, say: Say) -> None:
    say(f"models  {', '.join(service.names)}")
    say(f"gateway {url}  (POST {url}/v1/rag/query, {url}/v1/chat/completions; GET {url}/docs, {url}/metrics)")
    if not _is_loopback(host):
        say(f"warning: {host} is reachable from other machines, and there is no authentication")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(address: socket.socket) -> str:
    host, port = address.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _version() -> str:
    try:
        return metadata.version("llmlab")
    except metadata.PackageNotFoundError:
        return "0+source"
