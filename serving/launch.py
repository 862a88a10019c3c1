"""Serving from start to stop: choose the engine and the adapter, check them, start the engine, run the gateway, clean up.

`serve` runs until Ctrl-C; `running` serves for the length of a `with` block. Neither generates anything itself. Run by:

    llmlab serve MODEL [--adapter latest|none|RUN|NAME=RUN ...] [--port 8000] [--set engine=llamacpp]
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.metrics import set_engine
from pipelines import catalogue
from pipelines.architecture import cache_of, config_of
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.errors import ConfigError, EngineError
from pipelines.hardware import Choice, choose_engine, probe
from serving import engines
from serving.access import Access, loopback
from serving.adapters import Adapters
from serving.address import check_free, listen
from serving.admission import Admission
from serving.crew import Crew, Job
from serving.documents import Documents
from serving.drain import Drain
from serving.engines.contract import Launch
from serving.engines.provider import PROVIDER, remote_model
from serving.engines.vllm import check_gpus, check_room, weight_bytes
from serving.keys import key_path
from serving.knowledge import Knowledge, open_knowledge
from serving.logs import written
from serving.prices import price_of
from serving.rates import Rates
from serving.service import Service
from serving.settings import ServeConfig
from serving.sizes import check_context, sizes_of
from serving.supervisor import Supervisor
from serving.tls import context as tls_context
from serving.traces import check_traces
from serving.tuned import LATEST, NONE, Chosen, check_template, choose, exported_base, tuned_name
from serving.upstream import Upstream
from serving.workers import Workers

if TYPE_CHECKING:
    from ssl import SSLContext

    from serving.server import DrainingServer

Say = Callable[[str], None]
WORK = ROOT / ".cache" / "serve"
ENGINE_HOST = "127.0.0.1"  # the engine has no limits and no authentication: only the gateway talks to it
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Running:
    """A gateway that answers.

    Attributes:
        url: address of the gateway.
        service: what is served.
    """

    url: str
    service: Service

    @property
    def engine_url(self) -> str:
        """Return the address of the engine that answers now."""
        return self.service.upstream.launch.url


def serve(model_name: str, config: ServeConfig, *, adapter: str | Sequence[str] = LATEST, pull: bool = False, say: Say) -> None:
    """Serve a model until Ctrl-C or SIGTERM; nothing is left running afterwards.

    Args:
        model_name: a catalogue entry.
        config: addresses, sizes and limits.
        adapter: "latest", "none", the id of a finetune or export run, or several of them, also as NAME=RUN.
        pull: allow the weights to be fetched if they are not on disk.
        say: receives lines for the user.

    Raises:
        LabError: something does not fit or does not start; the message says what, and what to do.
    """
    try:
        with written(config.log), stopped_by_signals() as asked:
            (_serve_by_workers if config.workers > 1 else _serve_here)(model_name, config, adapter, pull, say, asked)
    except KeyboardInterrupt:
        pass
    say("stopped")


def _serve_here(
    model_name: str, config: ServeConfig, adapter: str | Sequence[str], pull: bool, say: Say, asked: Callable[[], bool]
) -> None:
    """Be the gateway."""
    with _prepared(model_name, config, adapter, pull, say) as (service, server, address):
        if asked():
            raise KeyboardInterrupt
        say("ready; Ctrl-C stops gateway and engine")
        service.supervisor.watch()
        server.run(sockets=[address])


def _serve_by_workers(
    model_name: str, config: ServeConfig, adapter: str | Sequence[str], pull: bool, say: Say, asked: Callable[[], bool]
) -> None:
    """Keep the engine here, and the gateway in processes of its own."""
    with _begun(model_name, config, adapter, pull, say) as begun:
        launch, most = begun.supervisor.launch, config.admission.running or begun.supervisor.launch.slots
        if config.workers > most:
            raise ConfigError(f"{config.workers} workers share {most} generations at once", f"at most {most} workers",
                              f"--set workers={most}, or more slots")  # fmt: skip
        _await_engine(begun)
        adapters = [f"{each.name}={each.run.id}" for each in launch.adapters]
        job = Job(model=model_name, engine=begun.supervisor.engine.name, engine_port=launch.port, config=_as_begun(config, begun),
                  adapters=adapters or [begun.chosen.whole.id if begun.chosen.whole else NONE])  # fmt: skip
        with Workers(job, begun.address, begun.supervisor, WORK) as workers:
            _say_addresses(_url(begun.address, config), config.host, launch.names, say)
            say(f"ready, with {config.workers} workers; Ctrl-C stops gateway and engine")
            begun.supervisor.watch()
            workers.keep(asked)


@contextmanager
def running(
    model_name: str, config: ServeConfig, *, adapter: str | Sequence[str] = LATEST, pull: bool = False, say: Say
) -> Iterator[Running]:
    """Serve a model for the length of the block, from a thread of this process, so by one worker.

    Arguments and errors are those of `serve`.
    """
    with _prepared(model_name, config, adapter, pull, say) as (service, server, address):
        service.supervisor.watch()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, name="gateway")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise EngineError("the gateway did not start", "a running gateway", "make doctor")
                time.sleep(0.02)
            yield Running(_url(address, config), service)
        finally:
            service.drain.begin()
            thread.join()


@dataclass(frozen=True)
class _Begun:
    """An engine that loads, and what is known before it answers."""

    model: Model
    chosen: Chosen
    supervisor: Supervisor
    access: Access
    address: socket.socket


@contextmanager
def _begun(model_name: str, config: ServeConfig, adapter: str | Sequence[str], pull: bool, say: Say) -> Iterator[_Begun]:
    """Check everything that can be checked first, take the address, start the engine, and stop it at the end."""
    check_traces(config.trace)
    if config.log.prompts:
        say("warning: log.prompts is true, so the log holds what users ask")
    choice = choose_engine(config.engine)
    model = model_of(model_name, choice.choice, config)
    check_context(model, config)
    say(f"engine  {choice.choice}: {choice.reason}")
    chosen = _chosen(model, choice, [adapter] if isinstance(adapter, str) else adapter, say)
    _tls(config)
    with listen(config.host, config.port, "--port 8001") as address, ExitStack() as stack:
        access = Access(key_path(config.keys), config.host, Rates(WORK / "spent.sqlite"))
        stack.callback(access.rates.close)
        supervisor = _supervisor(model, config, choice, chosen, pull, say)
        stack.callback(supervisor.stop)
        supervisor.spawn()
        yield _Begun(model, chosen, supervisor, access, address)


@contextmanager
def _prepared(
    model_name: str, config: ServeConfig, adapter: str | Sequence[str], pull: bool, say: Say
) -> Iterator[tuple[Service, DrainingServer, socket.socket]]:
    """Yield a healthy engine behind a gateway that is ready to run, and stop the engine at the end."""
    with _begun(model_name, config, adapter, pull, say) as begun, ExitStack() as stack:
        knowledge = open_knowledge(config.index, config.rag)  # while the engine loads
        say(f"index   {knowledge.summary}")
        _await_engine(begun)
        service = service_of(begun.model, config, begun.chosen, begun.supervisor, knowledge, begun.access, None)
        stack.callback(service.adapters.stop)
        _say_addresses(_url(begun.address, config), config.host, service.names, say)
        yield service, server_of(service), begun.address


def _as_begun(config: ServeConfig, begun: _Begun) -> ServeConfig:
    """Return a configuration that leaves no size open: another look at the free memory would find less of it."""
    launch = begun.supervisor.launch
    slots = config.slots.model_copy(update={begun.supervisor.engine.name: launch.slots})
    return config.model_copy(update={"context_tokens": launch.context_tokens, "slots": slots})


def _await_engine(begun: _Begun) -> None:
    begun.supervisor.await_health()
    for run in begun.chosen.runs:
        check_template(run, begun.supervisor.engine, begun.supervisor.launch)


def model_of(name: str, engine: str, config: ServeConfig) -> Model:
    """Return what an engine serves by that name: an entry of the catalogue, or for a provider also a model that is only there."""
    return remote_model(name, config.provider) if engine == PROVIDER else catalogue.runnable(name)


def service_of(
    model: Model, config: ServeConfig, chosen: Chosen, supervisor: Supervisor, knowledge: Knowledge, access: Access,
    crew: Crew | None,
) -> Service:  # fmt: skip
    """Return what a gateway process serves in front of an engine; the process is one of `crew`, or there is no other."""
    upstream = Upstream(supervisor.engine, supervisor.launch, supervisor, config.request_seconds, price_of(model, config.prices))
    return Service(
        config=config, upstream=upstream, adapters=Adapters(upstream, model, config, whole=chosen.whole is not None),
        knowledge=knowledge, documents=Documents(knowledge, config), run=chosen.whole, base=_base(model, supervisor.launch),
        access=access, admission=Admission(config.admission, supervisor.launch.slots), drain=Drain(config.drain_seconds),
        crew=crew,
    )  # fmt: skip


def _chosen(model: Model, choice: Choice, wanted: Sequence[str], say: Say) -> Chosen:
    """Return the runs that are served, and tell the user which."""
    if choice.choice == PROVIDER:
        if set(wanted) - {LATEST, NONE}:
            raise ConfigError(
                "a provider's model takes no adapters", "a model that runs here", "llmlab serve MODEL --adapter RUN"
            )
        return Chosen(None, ())
    chosen = choose(model, wanted)
    for line in _about(chosen, model.name, wanted):
        say(line)
    return chosen


def _supervisor(model: Model, config: ServeConfig, choice: Choice, chosen: Chosen, pull: bool, say: Say) -> Supervisor:
    engine, machine = engines.named(choice.choice), probe()
    gpu = bool(machine.gpus) and choice.choice == "vllm"
    if choice.choice == "vllm":
        check_gpus(config.vllm, len(machine.gpus))
    port = check_free(ENGINE_HOST, config.engine_port, "--set engine_port=8082")
    launch = launch_of(model, config, choice.choice, chosen, port, pull, say)
    if gpu and model.config:
        check_room(launch, cache_of(config_of(model)), min(card.memory_bytes for card in machine.gpus))
    set_engine(choice.choice, choice.reason, launch.slots)
    return Supervisor(engine, launch, config.startup_seconds, config.restart)


def launch_of(model: Model, config: ServeConfig, engine_name: str, chosen: Chosen, port: int, pull: bool, say: Say) -> Launch:
    """Return how an engine is started on a port; `WeightsMissing` if the base is not on disk and may not be fetched."""
    engine, machine, whole = engines.named(engine_name), probe(), chosen.whole
    base = exported_base(whole, engine_name) if whole else engine.base_path(model, pull, say)
    sizes = sizes_of(model, config, engine_name, machine, weight_bytes(base) if base else 0)
    return Launch(
        model=tuned_name(model.name) if whole else model.name,
        base=base,
        adapters=chosen.adapters,
        host=ENGINE_HOST,
        port=port,
        context_tokens=sizes.context_tokens,
        slots=sizes.slots,
        threads=machine.cpus,
        gpu=bool(machine.gpus) and engine_name == "vllm",
        work=WORK / f"{engine_name}-{port}",
        gpu_memory_share=sizes.gpu_memory_share,
        vllm=config.vllm,
        provider=config.provider.model_copy(update={"model": model.provider}),
        speculation=config.speculation,
    )


def server_of(service: Service) -> DrainingServer:
    """Return the server of a gateway process, ready to run."""
    from serving.gateway import create_app
    from serving.server import server

    app, config = create_app(service, _version()), service.config
    return server(app, service.drain, config.connections, _tls(config))


def _tls(config: ServeConfig) -> SSLContext | None:
    return tls_context(Path(config.tls_cert), Path(config.tls_key)) if config.tls_cert and config.tls_key else None


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


def _about(chosen: Chosen, model: str, wanted: Sequence[str]) -> list[str]:
    served = [("export", tuned_name(model), chosen.whole)] if chosen.whole else []
    served += [("adapter", adapter.name, adapter.run) for adapter in chosen.adapters]
    note = " (a REHEARSAL, named explicitly)"
    lines = [f"{kind} {run.id}, asked for as {name}{note if run.rehearsal else ''}" for kind, name, run in served]
    none = "the base alone was asked for" if LATEST not in wanted else f"{model} has no run yet (make finetune)"
    return lines or [f"adapter none: {none}"]


def _base(model: Model, launch: Launch) -> dict[str, Any]:
    weights = model.weights
    source = {"hub": weights.hub, "revision": weights.revision} if weights else {}
    of_provider = {"provider": model.provider} if launch.base is None else {"weights": launch.base.name}
    return {"title": model.title, **of_provider, **source}


def _say_addresses(url: str, host: str, names: Sequence[str], say: Say) -> None:
    say(f"models  {', '.join(names)}")
    say(f"gateway {url}  (POST {url}/v1/rag/query, {url}/v1/chat/completions; GET {url}/docs, {url}/metrics)")
    if not loopback(host) and url.startswith("http:"):
        say(
            f"warning: {host} is reachable from other machines, and keys and texts travel openly without --tls-cert and --tls-key"
        )


def _url(address: socket.socket, config: ServeConfig) -> str:
    host, port = address.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if config.tls_cert else 'http'}://{shown}:{port}"


def _version() -> str:
    try:
        return metadata.version("llmlab")
    except metadata.PackageNotFoundError:
        return "0+source"
