"""The gateway: one FastAPI application in front of the engine and the index. `serving.launch` runs it.

It owns the APIs, their limits and errors, and the metrics; generating is the engine's work. Its pages: /docs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from monitoring.metrics import REGISTRY, set_build, start_series
from pipelines.errors import LabError
from serving import documents_api, openai_api, page, rag_api
from serving.edge import Edge
from serving.problems import BadRequest, EngineDown, response
from serving.service import Service

DESCRIPTION = "A tuned model, its base and a knowledge base behind one API. OpenAI's clients work below /v1 unchanged."
SHOWN_PROBLEMS = 5


def create_app(service: Service, version: str) -> FastAPI:
    """Return the application that serves `service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.upstream:
            service.documents.start()
            yield

    app = FastAPIOffline(title="LLM Lab", version=version, description=DESCRIPTION, lifespan=lifespan)
    app.add_middleware(Edge, limit_of=partial(documents_api.body_limit, service.config))
    app.include_router(openai_api.router(service))
    app.include_router(rag_api.router(service))
    app.include_router(documents_api.router(service))
    app.include_router(page.router(service))
    _add_operations(app, service)
    app.add_exception_handler(LabError, _lab_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    set_build(version)
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

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Return the gateway's metrics for Prometheus."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def _lab_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LabError)
    return response(error, request.url.path)


async def _invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with each field; the values that came are not repeated."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
    more = f" (and {len(problems) - SHOWN_PROBLEMS} more)" if len(problems) > SHOWN_PROBLEMS else ""
    return response(BadRequest("; ".join(problems[:SHOWN_PROBLEMS]) + more, "the fields shown at /docs"), request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for an unknown path, a wrong method, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    problem = LabError(f"{request.method} {request.url.path}: {error.detail}", "a path and method shown at /docs")
    problem.http_status = error.status_code
    return response(problem, request.url.path)
