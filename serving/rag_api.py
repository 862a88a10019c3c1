"""Questions answered from the index, with citations: POST /v1/rag/query, as one JSON answer or as server-sent events.

The prompt and the reading of the reply are `pipelines.rag.answer`'s, the same as in training. Greedy decoding.

    curl -s http://127.0.0.1:8000/v1/rag/query -H 'Content-Type: application/json' -d '{"question": "Who made Phi-2?"}'
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from monitoring.metrics import (
    RAG_CITATIONS,
    RAG_CONTEXT,
    RAG_DURATION,
    RAG_HITS,
    RAG_REQUESTS,
    RAG_SENTENCES,
    RAG_STAGE_DURATION,
    RAG_TOP_SCORE,
)
from pipelines.errors import LabError
from pipelines.rag.answer import ABSTENTION, Reply, parse
from serving import limits, record
from serving.admission import BYTES_PER_TOKEN, Need
from serving.guard.contract import Told
from serving.leaving import ClientGone, EventStream, WhilePresent
from serving.packing import Packed, fitting
from serving.problems import lab_body, unexpected
from serving.rag_events import AnswerReader, Step
from serving.service import Service
from serving.upstream import Meter, text_of

if TYPE_CHECKING:
    from pipelines.rag.index import Hit
    from pipelines.rag.retrieve import Retrieved

PASSAGE_TOKENS = 150  # of a prompt, for each passage, about


class Query(BaseModel):
    """A question."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    k: int | None = Field(None, description="passages to read; the configuration's number if left out")
    where: str | None = Field(None, description='which passages are searched, such as source like "api/*" and page >= 3')
    model: str | None = Field(None, description="base or adapter; the adapter, if there is one, if left out")
    max_tokens: int | None = Field(None, description="longest answer")
    stream: bool = Field(
        False, description="server-sent events: passages, then token, citation, sentence as they come, then answer"
    )


class Passage(BaseModel):
    """A passage that the model was given: `number` is what the answer cites, `score` what it was ranked by."""

    number: int
    source: str
    title: str
    chunk_id: str
    score: float
    cosine: float | None
    text: str
    page: int | None


class Timings(BaseModel):
    """Seconds of each stage.

    Attributes:
        prompt_seconds: from asking the engine to its first token.
        generate_seconds: from the first token to the last.
        ttft_seconds: from the question to the first token; None if nothing was generated.
    """

    embed_seconds: float
    search_seconds: float
    prompt_seconds: float
    generate_seconds: float
    ttft_seconds: float | None
    total_seconds: float


class LeftOut(BaseModel):
    """A passage that was found and not given to the model; the reason says why."""

    source: str
    title: str
    chunk_id: str
    reason: str


class Sentence(BaseModel):
    """A sentence of the answer, the numbers it cites, and whether they hold it; null where nothing can be checked."""

    text: str
    citations: list[int]
    supported: bool | None


class Guarded(BaseModel):
    """How often something of a kind was replaced in question, passages and answer; and the guard that stopped the answer."""

    redacted: dict[str, int]
    blocked: str | None


class Answer(BaseModel):
    """An answer; `citations` are the passages that it cites, `passages` all that were found for it and fit into the prompt.

    Attributes:
        abstained: the documents do not hold the answer.
        abstained_by: what said so: the model, or before it retrieval, whose sign was below the threshold of the index.
        sign: how much speaks for an answer in the passages, 0..1.
        held_back: passages that seem to give the model instructions.
        left_out: passages that did not fit into the prompt.
    """

    answer: str
    abstained: bool
    abstained_by: Literal["model", "retrieval"] | None
    sign: float
    sentences: list[Sentence]
    citations: list[Passage]
    invalid_citations: list[int]
    passages: list[Passage]
    held_back: list[LeftOut]
    left_out: list[LeftOut]
    model: str
    timings: Timings
    usage: dict[str, int]
    guard: Guarded


def router(service: Service) -> APIRouter:
    """Return the endpoint that answers from the index."""
    routes = APIRouter(prefix="/v1/rag", tags=["RAG"])

    @routes.post("/query", response_model=Answer)
    async def query(body: Query, request: Request) -> Response:
        """Answer a question from the index and cite the passages; abstain if they do not hold the answer."""
        steps = _counted(_steps(body, service))
        try:
            with WhilePresent(request.receive):
                if not body.stream:
                    return JSONResponse(await _last(steps))
                first = await anext(steps)
        except ClientGone:
            return Response(status_code=499)
        return EventStream(_events(first, steps))

    return routes


async def _steps(query: Query, service: Service) -> AsyncIterator[Step]:
    """Yield the events of an answer (serving.rag_events), ("answer", ...) last."""
    began = time.perf_counter()
    limits.check_question(query.question, service.config)
    k = limits.check_k(query.k, service.knowledge.top_k, service.config)
    length = limits.check_max_tokens(query.max_tokens, service.config)
    model = limits.check_model(query.model or service.preferred, service.names)
    service.knowledge.require()
    told = Told()
    question = service.guard.question(query.question, told)
    await service.admission.enter(Need(1, len(question) // BYTES_PER_TOKEN + k * PASSAGE_TOKENS, length))
    with record.current().retrieval(service.knowledge.name) as span:
        found = service.guard.passages(await service.knowledge.retrieve(question, k, query.where), told)
        span.set("llmlab.retrieval.passages", len(found.hits))
    _count_retrieval(found)
    if found.answerable and found.hits:
        packed = await fitting(question, found.hits, service.upstream, _room(service, length))
    else:
        packed = Packed([], found.hits, ())
    hits = packed.hits if found.answerable else ()
    passages = _passages(packed.hits)
    yield "passages", {"passages": passages}
    meter, reader = Meter(model), AnswerReader(service.knowledge, replace(found, hits=packed.hits))
    if hits:
        body = {"model": model, "messages": packed.messages, "temperature": 0, "max_tokens": length}
        async with aclosing(service.guard.stream(service.upstream.stream(body, meter), told)) as chunks:
            async for chunk in chunks:
                if piece := text_of(chunk):
                    for step in await reader.feed(piece):
                        yield step
    timings = _timings(began, found, meter)
    for step in await reader.end():
        yield step
    reply = parse(reader.text if hits else ABSTENTION, len(passages))
    _count_citations(reply)
    answer = {
        "answer": reply.text, "abstained": reply.abstained,
        "abstained_by": ("model" if hits else "retrieval") if reply.abstained else None, "sign": found.sign,
        "sentences": reader.sentences,
        "citations": [passages[number - 1] for number in reply.cited], "invalid_citations": list(reply.invalid),
        "passages": passages, "held_back": [_left_out(hit, reason) for hit, reason in found.held_back],
        "left_out": [_left_out(hit, "no room in the prompt") for hit in packed.left_out],
        "model": model, "timings": timings, "usage": meter.usage, "guard": told.shown(),
    }  # fmt: skip
    yield "answer", answer


def _room(service: Service, length: int) -> int:
    """Return the tokens that a prompt may take: what the configuration says, or what the context leaves beside the reply."""
    return min(service.knowledge.config.context_max_tokens, service.upstream.launch.context_tokens - length)


def _passages(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    return [
        {"number": number, "source": hit.source, "title": hit.title, "chunk_id": hit.chunk_id, "score": hit.score,
         "cosine": hit.cosine, "text": hit.text, "page": hit.page}
        for number, hit in enumerate(hits, 1)
    ]  # fmt: skip


def _left_out(hit: Hit, reason: str) -> dict[str, str]:
    return {"source": hit.source, "title": hit.title, "chunk_id": hit.chunk_id, "reason": reason}


def _timings(began: float, found: Retrieved, meter: Meter) -> dict[str, float | None]:
    """Return the seconds of each stage, and put those of the engine into the metrics."""
    now, first = time.perf_counter(), meter.first_token
    prompt, generate = (first - meter.began, now - first) if first else (now - meter.began, 0.0)
    if first:
        RAG_STAGE_DURATION.labels(stage="prompt").observe(prompt)
        RAG_STAGE_DURATION.labels(stage="generate").observe(generate)
    return {
        "embed_seconds": found.embed_seconds, "search_seconds": found.search_seconds, "prompt_seconds": prompt,
        "generate_seconds": generate, "ttft_seconds": first - began if first else None, "total_seconds": now - began,
    }  # fmt: skip


def _count_retrieval(found: Retrieved) -> None:
    RAG_STAGE_DURATION.labels(stage="embed").observe(found.embed_seconds)
    RAG_STAGE_DURATION.labels(stage="search").observe(found.search_seconds)
    RAG_HITS.observe(len(found.hits))
    cosines = [hit.cosine for hit in found.hits if hit.cosine is not None]
    if cosines:
        RAG_TOP_SCORE.observe(max(cosines))


def _count_citations(reply: Reply) -> None:
    RAG_CITATIONS.labels(valid="yes").inc(len(reply.cited))
    RAG_CITATIONS.labels(valid="no").inc(len(reply.invalid))


def _count_answer(answer: dict[str, Any]) -> None:
    RAG_REQUESTS.labels(outcome="abstained" if answer["abstained"] else "answered").inc()
    RAG_DURATION.observe(answer["timings"]["total_seconds"])
    if answer["usage"]:
        RAG_CONTEXT.observe(answer["usage"]["prompt_tokens"])
    for sentence in answer["sentences"]:
        supported = "unchecked" if sentence["supported"] is None else "yes" if sentence["supported"] else "no"
        RAG_SENTENCES.labels(supported=supported).inc()


async def _counted(steps: AsyncIterator[Step]) -> AsyncIterator[Step]:
    """Pass the steps on and count the question by its outcome; not one that was refused or whose client left."""
    try:
        async for kind, content in steps:
            if kind == "answer":
                _count_answer(content)
            yield kind, content
    except Exception as error:
        if not isinstance(error, LabError) or error.http_status >= 500:
            RAG_REQUESTS.labels(outcome="error").inc()
        raise


async def _last(steps: AsyncIterator[Step]) -> dict[str, Any]:
    return [content async for _, content in steps][-1]


async def _events(first: Step, steps: Any) -> AsyncGenerator[bytes, None]:
    """Yield the steps as server-sent events; an error after the first becomes an `error` event."""
    try:
        async with aclosing(steps):
            yield _event(*first)
            async for kind, content in steps:
                yield _event(kind, content)
    except Exception as error:  # the status is sent already: the stream itself must say it
        yield _event("error", lab_body(error if isinstance(error, LabError) else unexpected(error)))


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(content) + b"\n\n"
