"""Which adapters are served, changed while requests go on: one is added from a run, takes the place of another, or goes.

A change is made ready beside what serves: for llama.cpp, which loads no adapter while it runs, as a second engine with the new
set; for vLLM through its own API. It is tried out (template lock, an answer from each model), then new requests go to it in one
step, and those under way end where they began. Whatever fails before that step leaves everything as it was. The endpoints
are in `serving.adapters_api`; which run may be served is for `serving.tuned` to say.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from monitoring.metrics import ADAPTER_CHANGES, start_series
from pipelines.catalogue import Model
from pipelines.errors import EngineError, FingerprintMismatch, LabError, RehearsalRefused
from pipelines.hardware import probe
from serving.address import check_free
from serving.engines.contract import Adapter, Launch, LiveAdapters
from serving.problems import BadRequest, EngineFailed
from serving.settings import ServeConfig
from serving.supervisor import Supervisor
from serving.tuned import EXPORT, adapter_of, check_names, check_template, choose_run, short_name, tuned_name
from serving.upstream import CHAT_PATH, Route, Upstream

if TYPE_CHECKING:
    import httpx

LOG = logging.getLogger("serving")
MAX_ADAPTERS = 32
HEALTH_PROMPT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
CHECK_SECONDS = 60.0


class Adapters:
    """Changes the adapters of a running service, one change at a time; `async with` it while the gateway runs.

    Args:
        upstream: what is served, and where the step is made.
        model: the model that is served; runs of another are refused.
        config: how long engines may take.
        whole: True if an export run is served in place of the base, which takes no adapters.
    """

    def __init__(self, upstream: Upstream, model: Model, config: ServeConfig, *, whole: bool) -> None:
        self.upstream, self.model, self.config, self.whole = upstream, model, config, whole
        self._turn = asyncio.Lock()
        self._retiring: asyncio.Task[None] | None = None
        self._leaving: Route | None = None
        self._started: list[Supervisor] = []
        self._stopped, self._guard = False, threading.Lock()

    async def __aenter__(self) -> Adapters:
        """Return this."""
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait no longer for requests of an earlier engine."""
        if self._retiring:
            self._retiring.cancel()
            await asyncio.gather(self._retiring, return_exceptions=True)

    def stop(self) -> None:
        """End every engine that a change has started, and let none start any more."""
        with self._guard:
            self._stopped, started = True, list(self._started)
        for supervisor in started:
            supervisor.stop()

    @property
    def served(self) -> tuple[Adapter, ...]:
        """Return the adapters that new requests can name."""
        return self.upstream.launch.adapters

    @property
    def changing(self) -> bool:
        """Return True from the start of a change until nothing of the set before it is left."""
        return self._turn.locked() or self._leaving is not None

    @property
    def leaving(self) -> int:
        """Return how many requests are still answered by the set before the last change."""
        return self._leaving.requests if self._leaving else 0

    async def add(self, run_id: str, name: str | None = None) -> Adapter:
        """Serve the adapter of a run, and return it; one that has its name is replaced.

        Args:
            run_id: the id of a finetune run, or "latest".
            name: what a request's `model` will say; None for MODEL-tuned, or, if that is taken, MODEL- with the end of the id.

        Raises:
            LabError: the run is unknown, damaged, a rehearsal or of another model, or the engine did not do well with it;
                nothing was changed.
        """
        from starlette.concurrency import run_in_threadpool

        with _counted("add"):
            async with self._turn:
                adapter = await run_in_threadpool(self._verified, run_id, name)
                if adapter not in self.served:
                    await self._change(_with(self.served, adapter), adapter)
        return adapter

    async def remove(self, name: str) -> Adapter:
        """Serve an adapter no longer, and return it.

        Raises:
            UnknownName: no adapter has this name.
            LabError: the engine did not do well without it; nothing was changed.
        """
        with _counted("remove"):
            async with self._turn:
                adapter = self.upstream.launch.adapter(name)
                if adapter is None:
                    raise BadRequest(f"{name} is the base", "the name of an adapter", "GET /v1/adapters")
                await self._change(tuple(other for other in self.served if other is not adapter), None)
        return adapter

    def _verified(self, run_id: str, name: str | None) -> Adapter:
        """Return the adapter of an intact, real run of this model, under a name that can be had."""
        if not self.upstream.engine.has_adapters or self.whole:
            what = "a merged model" if self.whole else f"the engine {self.upstream.engine.name}"
            raise BadRequest(f"{what} takes no adapters", "a base of the catalogue on llama.cpp or vLLM", "llmlab serve MODEL")
        run = choose_run(self.model, run_id)
        if run is None:
            raise BadRequest("no run is named", "the id of a run", "llmlab runs list")
        if run.rehearsal:
            raise RehearsalRefused(f"run {run.id} is a rehearsal: its base was shrunk and random", "a run on real weights",
                                   f"make finetune MODEL={self.model.name}")  # fmt: skip
        if run.kind == EXPORT:
            raise FingerprintMismatch(f"run {run.id} is a model of its own", "a finetune run", f"llmlab serve --adapter {run.id}")
        same = [adapter for adapter in self.served if adapter.run.id == run.id and name in (None, adapter.name)]
        if same:
            return same[0]
        taken = {adapter.name for adapter in self.served}
        tuned = tuned_name(self.model.name)
        adapter = adapter_of(run, self.model.name, name or (short_name(self.model.name, run) if tuned in taken else tuned))
        check_names(self.model.name, [adapter.name])
        if len(taken | {adapter.name}) > MAX_ADAPTERS:
            raise BadRequest(f"{len(taken)} adapters are served", f"at most {MAX_ADAPTERS}", "DELETE /v1/adapters/NAME")
        return adapter

    async def _change(self, adapters: tuple[Adapter, ...], added: Adapter | None) -> None:
        """Make the new set ready, send new requests to it, and see the earlier one out in the background."""
        from starlette.concurrency import run_in_threadpool

        if self._retiring:
            await self._retiring  # never three sets at once
        launch, supervisor = await run_in_threadpool(self._ready, adapters, added)
        start_series(launch.names)
        supervisor.launch = launch  # what it starts again after a crash
        self._leaving = before = self.upstream.switch(launch, supervisor)
        if supervisor is not before.supervisor:
            supervisor.take_over(before.supervisor)
            supervisor.watch()
        self._retiring = asyncio.create_task(self._retire(before))

    async def _retire(self, before: Route) -> None:
        """Wait for the requests that began before the change, then free what only they needed."""
        from starlette.concurrency import run_in_threadpool

        try:
            async with asyncio.timeout(self.config.request_seconds):
                await before.idle()
        except TimeoutError:
            LOG.warning(
                "%d requests did not end in %g s after a change of adapters", before.requests, self.config.request_seconds
            )
        self._leaving = None
        try:
            await run_in_threadpool(self._free, before)
        except (EngineError, OSError) as error:
            LOG.warning("after a change of adapters: %s", error)

    def _free(self, before: Route) -> None:
        live = self.upstream.engine.live_adapters
        if before.supervisor is not self.upstream.supervisor:
            before.supervisor.stop()
            shutil.rmtree(before.launch.work, ignore_errors=True)
        elif live:
            for adapter in [each for each in before.launch.adapters if each not in self.served]:
                _ask_engine(live, self.upstream.launch, adapter, load=False)

    def _ready(self, adapters: tuple[Adapter, ...], added: Adapter | None) -> tuple[Launch, Supervisor]:
        """Return a checked engine that has these adapters; `EngineFailed` if there cannot be one."""
        try:
            if self.upstream.engine.live_adapters:
                return self._loaded(self.upstream.engine.live_adapters, adapters, added)
            return self._beside(adapters, added)
        except EngineError as error:
            came = f"nothing was changed, since the engine with {_list(adapters)} is not well: {error.came}"
            raise EngineFailed(came, error.expected, error.next_command) from error

    def _loaded(self, live: LiveAdapters, adapters: tuple[Adapter, ...], added: Adapter | None) -> tuple[Launch, Supervisor]:
        """Let the running engine load the new adapter, and try it."""
        launch = replace(self.upstream.launch, adapters=adapters)
        if added:
            _ask_engine(live, launch, added, load=True)
            try:
                self._try(launch, added, (added.name,))
            except LabError:
                _ask_engine(live, launch, added, load=False)
                raise
        return launch, self.upstream.supervisor

    def _beside(self, adapters: tuple[Adapter, ...], added: Adapter | None) -> tuple[Launch, Supervisor]:
        """Start a second engine with the new set, and try each of its models."""
        serving = self.upstream.supervisor
        needed, free = serving.memory_bytes(), probe().free_memory_bytes
        if free < needed:
            came = f"a second engine needs {needed / 1e9:.2f} GB while the change is made, {free / 1e9:.2f} GB are free"
            raise EngineError(came, "memory for both", "llmlab serve --adapter RUN --adapter RUN, which starts one")
        port = check_free(serving.launch.host, 0, "")
        work = serving.launch.work.with_name(f"{self.upstream.engine.name}-{port}")
        launch = replace(self.upstream.launch, adapters=adapters, port=port, work=work)
        supervisor = Supervisor(self.upstream.engine, launch, self.config.startup_seconds, self.config.restart, serves=False)
        with self._guard:
            if self._stopped:
                raise EngineError("the gateway is being stopped")
            self._started = [s for s in self._started if s is serving] + [supervisor]
        try:
            supervisor.spawn()
            supervisor.await_health()
            self._try(launch, added, launch.names)
        except BaseException:
            supervisor.stop()
            raise
        return launch, supervisor

    def _try(self, launch: Launch, added: Adapter | None, names: Sequence[str]) -> None:
        """Compare the template with the adapter's lock, and get an answer from each of these models."""
        import httpx

        if added:
            check_template(added.run, self.upstream.engine, launch)
        with httpx.Client(base_url=launch.url, trust_env=False, timeout=CHECK_SECONDS) as client:
            for name in names:
                _try_prompt(client, self.upstream, launch, name)


@contextmanager
def _counted(change: str) -> Iterator[None]:
    """Count a change by how it ends."""
    try:
        yield
    except BaseException:
        ADAPTER_CHANGES.labels(change=change, outcome="failed").inc()
        raise
    ADAPTER_CHANGES.labels(change=change, outcome="ok").inc()


def _with(adapters: tuple[Adapter, ...], added: Adapter) -> tuple[Adapter, ...]:
    """Return the adapters with one more, in the place of the one that has its name."""
    if added.name in [adapter.name for adapter in adapters]:
        return tuple(added if adapter.name == added.name else adapter for adapter in adapters)
    return (*adapters, added)


def _try_prompt(client: httpx.Client, upstream: Upstream, launch: Launch, name: str) -> None:
    """Raise `EngineError` unless a model answers a short prompt with some text."""
    import httpx

    try:
        reply = client.post(CHAT_PATH, json=upstream.engine.select({"model": name, **HEALTH_PROMPT}, launch))
    except httpx.HTTPError as error:
        raise EngineError(f"{name} did not answer a short prompt ({type(error).__name__})", "an answer") from None
    if reply.status_code != 200 or not reply.json()["choices"][0]["message"].get("content"):
        raise EngineError(f"{name} answered a short prompt with {reply.status_code} and {reply.text[:200]}", "some text")


def _ask_engine(live: LiveAdapters, launch: Launch, adapter: Adapter, *, load: bool) -> None:
    """Let the running engine take an adapter in, or give it up; `EngineError` if it does not."""
    import httpx

    try:
        with httpx.Client(trust_env=False, timeout=CHECK_SECONDS) as client:
            (live.load if load else live.unload)(client, launch, adapter)
    except httpx.HTTPError as error:
        raise EngineError(f"the engine did not answer ({type(error).__name__})", "a running engine", "GET /readyz") from None


def _list(adapters: tuple[Adapter, ...]) -> str:
    return ", ".join(adapter.name for adapter in adapters) or "no adapter"
