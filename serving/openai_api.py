"""OpenAI's chat API: models and chat completions, passed through to the engine.

The gateway checks the limits, sets the length of the reply, and lets `model` choose base or adapter; the rest of a
request is the engine's business. Any client of that API works unchanged:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="smollm2-135m", ...)
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from monitoring.metrics import GENERATION_REQUESTS, OTHER
from pipelines.errors import LabError, UnknownName
from serving import limits
from serving.problems import openai_body, unexpected
from serving.service import Service
from serving.upstream import DONE, ClientGone, Meter, unless_gone

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Message(BaseModel):
    """One turn of a chat; what else it holds is the engine's business."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str


class ChatRequest(BaseModel):
    """The fields that the gateway looks at; every other field of OpenAI's API goes to the engine as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(description="the base, or an adapter: its name with -tuned for the newest")
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


def router(service: Service) -> APIRouter:
    """Return the endpoints below /v1 that speak OpenAI's API."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """List the served models, each with its passport."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """Show one served model."""
        return _card(service, limits.check_model(name, service.names))

    @routes.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Complete a chat, in one piece or as a stream of server-sent events."""
        asked = _checked(body, service)
        try:
            if not body.stream:
                return JSONResponse(await unless_gone(request, service.upstream.complete(asked)))
            chunks = service.upstream.stream(asked, Meter(body.model))
            first = await unless_gone(request, _next(chunks))
        except ClientGone:
            return Response(status_code=499)
        wants_usage = bool((body.stream_options or {}).get("include_usage"))
        return StreamingResponse(_events(first, chunks, wants_usage), media_type="text/event-stream", headers=SSE_HEADERS)

    return routes


def _card(service: Service, name: str) -> dict[str, Any]:
    run = service.run_of(name)
    stamp = int(datetime.strptime(run.created, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()) if run else 0
    return {"id": name, "object": "model", "created": stamp, "owned_by": "llmlab", "passport": service.passport(name)}


def _checked(body: ChatRequest, service: Service) -> dict[str, Any]:
    """Return the request as the engine gets it; a refused one is counted."""
    try:
        limits.check_model(body.model, service.names)
        return limits.bounded_chat(body.model_dump(exclude_unset=True), service.config, service.slots)
    except LabError as error:
        name = OTHER if isinstance(error, UnknownName) else body.model
        GENERATION_REQUESTS.labels(model=name, outcome="refused").inc()
        raise


async def _next(chunks: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the first chunk; an error of the engine comes out here, while there is still a status to send."""
    return await anext(chunks)


async def _events(first: dict[str, Any], chunks: Any, wants_usage: bool) -> AsyncIterator[bytes]:
    """Yield the chunks as server-sent events, the usage only if it was asked for."""
    yield _event(first)
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.get("choices") or wants_usage:
                    yield _event(chunk)
    except Exception as error:  # the status is sent already: the stream itself must say it
        yield _event(openai_body(error if isinstance(error, LabError) else unexpected(error)))
        return
    yield f"data: {DONE}\n\n".encode()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
