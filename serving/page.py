"""The page at /: ask the documents or chat, in a browser. It serves fixed files of serving/static, and what the page must know.

No build step and no other host: the browser itself is told to load from here only, and to refuse text of a model as HTML.
Everything else that the page shows comes from the APIs that any client uses. Start it, and open http://127.0.0.1:8000/ :

    llmlab serve
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel

from pipelines.rag.chunk import Chunk
from pipelines.rag.screen import reason_to_hold_back
from serving.problems import lab_body
from serving.service import Service

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                               "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}  # fmt: skip
EXAMPLES = 4
LONGEST_NAME = 40  # characters of what an example asks about
_MADE = r" was (launched|developed|made|created|released|written|built|founded) by "
_IS = r" (?:is|are) (?:an?|the|one of|\w+ing) "


class Limits(BaseModel):
    """What a request may ask for, and what it gets if it does not say."""

    k: int
    max_k: int
    default_max_tokens: int
    max_tokens: int
    max_question_chars: int


class IndexFacts(BaseModel):
    """The index that is searched."""

    name: str
    chunks: int
    documents: int


class Playground(BaseModel):
    """What the page needs beside the other APIs.

    Attributes:
        index: None if there is none, and `problem` says why and what to do.
        examples: questions that a document of the index answers.
    """

    limits: Limits
    index: IndexFacts | None
    problem: dict[str, Any] | None
    examples: list[str]


def router(service: Service) -> APIRouter:
    """Return the page, its files, and GET /v1/playground."""
    routes = APIRouter(tags=["page"])

    @routes.get("/", include_in_schema=False)
    def page() -> FileResponse:
        """Return the page."""
        return _file("index.html")

    for name in FILES:
        routes.add_api_route(f"/static/{name}", lambda name=name: _file(name), include_in_schema=False, name=f"static {name}")

    @routes.get("/v1/playground")
    def playground() -> Playground:
        """Say what can be asked, within which limits, and with which questions one may begin."""
        return _playground(service)

    return routes


def examples(chunks: Sequence[Chunk], count: int = EXAMPLES) -> list[str]:
    """Return questions that documents answer in their first sentence, of documents from all over the index.

    A sentence "X was made by ..." asks who made X, "X is a ..." what it is; X is the title of the document.
    """
    first = {chunk.source: chunk for chunk in reversed(chunks)}
    questions = [question for chunk in reversed(first.values()) if (question := _question(chunk))]
    step = max(1.0, len(questions) / count)
    return [questions[int(number * step)] for number in range(min(count, len(questions)))]


def _question(chunk: Chunk) -> str | None:
    name = chunk.title.split(" > ")[0]
    made, is_ = (re.match(re.escape(name) + pattern, chunk.text) for pattern in (_MADE, _IS))
    if len(name) > LONGEST_NAME or not (made or is_) or reason_to_hold_back(chunk.text):
        return None
    return f"Who {made[1]} {name}?" if made else f"What is {name}?"


def _playground(service: Service) -> Playground:
    config, knowledge = service.config, service.knowledge
    index = knowledge.retriever.index if knowledge.retriever else None
    limits = Limits(
        k=min(knowledge.top_k, config.max_k), max_k=config.max_k, default_max_tokens=config.default_max_tokens,
        max_tokens=config.max_tokens, max_question_chars=config.max_question_chars,
    )  # fmt: skip
    facts = IndexFacts(name=index.name, chunks=len(index), documents=len(index.documents)) if index else None
    problem = lab_body(knowledge.problem)["error"] if knowledge.problem else None
    return Playground(limits=limits, index=facts, problem=problem, examples=examples(index.chunks) if index else [])


def _file(name: str) -> FileResponse:
    path = FILES[name]
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)
