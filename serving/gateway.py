"""The gateway: one FastAPI application in front of the engine and the index. `serving.launch` runs it.

It owns the APIs, their limits and errors, and the metrics; generating is the engine's work. Its pages: /docs.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from monitoring import hardware
from monitoring.metrics import ENGINE_PATH, GATEWAY_PATH, REGISTRY, set_build, set_models, start_series
from pipelines.config import ROOT
from pipelines.errors import LabError
from pipelines.runs import runs_root
from serving import adapters_api, documents_api, embeddings_api, openai_api, page, rag_api
from serving.edge import Edge
from serving.problems import BadRequest, EngineDown, LabProblem, UnknownField, clean, field_name, response
from serving.service import Service
from serving.traces import open_traces

DESCRIPTION = "A tuned model, its base and a knowledge base behind one API. OpenAI's clients work below /v1 unchanged."
SHOWN_PROBLEMS = 5
SCRAPING = threading.Lock()  # what is set anew for one scrape would be missing in another beside it


def create_app(service: Service, version: str) -> FastAPI:
    """Return the application that serves `service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.adapters:
            if not service.crew:  # several would build one index
                service.documents.start()
            yield
            if traces:
                await traces.close()

    problems: dict[int | str, dict[str, Any]] = {"4XX": {"model": LabProblem}, "5XX": {"model": LabProblem}}
    app = FastAPIOffline(title="LLM Lab", version=version, description=DESCRIPTION, lifespan=lifespan, responses=problems)
    config = service.config
    traces = open_traces(config.trace, service.supervisor.engine.name)
    app.add_middleware(Edge, limit_of=partial(documents_api.body_limit, config), access=service.access, drain=service.drain,
                       bounds=config.connections, traces=traces, prompts=config.log.prompts)  # fmt: skip
    if config.cors_origins:  # outside of Edge: a browser asks first, without the key, whether it may send it
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST", "DELETE"],
                           allow_headers=["Authorization", "Content-Type"],
                           expose_headers=["Retry-After", "X-Request-Id"])  # fmt: skip
    app.include_router(openai_api.router(service))
    app.include_router(embeddings_api.router(service))
    app.include_router(rag_api.router(service))
    app.include_router(documents_api.router(service))
    app.include_router(adapters_api.router(service))
    app.include_router(page.router(service))
    _add_operations(app, service)
    app.add_exception_handler(LabError, _lab_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    set_build(version)
    hardware.watch(REGISTRY, {"cache": ROOT / ".cache", "index": service.knowledge.folder.parent, "runs": runs_root()})
    start_series(service.names)
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operations"])
    def healthz() -> dict[str, str]:
        """Say that the gateway itself is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """Say whether the engine answers; 503 with the reason while it does not."""
        service.upstream.check_up()
        if not await service.upstream.healthy():
            raise EngineDown("the engine runs, but does not answer its health check", 1)
        return {"status": "ready", "engine": service.supervisor.engine.name, "rag": service.knowledge.summary}

    @app.get(GATEWAY_PATH, tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the gateway's metrics for Prometheus."""
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(await run_in_threadpool(_exposition, service), media_type=CONTENT_TYPE_LATEST)

    @app.get(ENGINE_PATH, tags=["operations"], response_class=PlainTextResponse)
    async def engine_metrics() -> Response:
        """Return the metrics of the engine that answers now, whatever its port; none for one that has no metrics."""
        return PlainTextResponse(await service.upstream.metrics())


def _exposition(service: Service) -> bytes:
    """Return the metrics as text, with what is looked at only when somebody asks."""
    from prometheus_client import generate_latest

    with SCRAPING:
        set_models(service.shown_passports())
        service.documents.count()
        if not service.crew:
            return generate_latest(REGISTRY)
        service.knowledge.look()  # so that all workers soon say the same of the index
        return service.crew.exposition()


async def _lab_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LabError)
    return response(error, request.url.path)


async def _invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with each field; the values that came are not repeated."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
    more = f" (and {len(problems) - SHOWN_PROBLEMS} more)" if len(problems) > SHOWN_PROBLEMS else ""
    kind = UnknownField if error.errors()[0]["type"] == "extra_forbidden" else BadRequest
    came, param = clean("; ".join(problems[:SHOWN_PROBLEMS]) + more), field_name(error.errors()[0]["loc"][1:])
    return response(kind(came, "the fields shown at /docs", param=param), request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for an unknown path, a wrong method, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    problem = LabError(f"{request.method} {request.url.path}: {error.detail}", "a path and method shown at /docs")
    problem.http_status = error.status_code
    return response(problem, request.url.path)
