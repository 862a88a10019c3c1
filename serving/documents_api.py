"""Documents of the index over the API: add, replace, list and remove them; the index follows in the background.

    curl -s http://127.0.0.1:8000/v1/documents -H "Authorization: Bearer $LLMLAB_ADMIN_KEY" -F file=@faq.md

The key is the one that the server was started with (serving.admin). `path` in the form names a document, folders included.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from pydantic import BaseModel
from starlette.types import Scope

from serving.admin import check_key
from serving.documents import Entry, State
from serving.problems import OPENAI_PROBLEMS, BadRequest, openai_body
from serving.service import Service
from serving.settings import ServeConfig

PATH = "/v1/documents"
FORM_BYTES = 65536  # of a form, beside the file in it
NEXT: dict[State, str] = {
    "pending": "the index is synced in the background; GET /v1/documents says when it has the document",
    "deleting": "the index is synced in the background; until then questions still find the document",
    "indexed": "the index has this document already",
    "skipped": "the index cannot read it; see reason",
}


class Card(BaseModel):
    """A document.

    Attributes:
        path: its name here; `source` is its name in answers.
        bytes: of the file; 0 once it is gone.
        chunks: of it in the index that serves.
        status: indexed, pending, skipped (with the reason), or deleting.
        next: what will happen.
    """

    object: Literal["document"] = "document"
    path: str
    source: str
    sha256: str
    bytes: int
    chunks: int
    status: State
    reason: str | None
    next: str


class IndexCard(BaseModel):
    """The index that serves; `problem` says why the last sync failed."""

    name: str
    generation: str | None
    chunks: int
    documents: int
    syncing: bool
    problem: dict[str, Any] | None


class Listing(BaseModel):
    """All documents that this API knows, and the index, which may have more: those of a folder that was indexed."""

    object: Literal["list"] = "list"
    data: list[Card]
    index: IndexCard


def body_limit(config: ServeConfig, scope: Scope) -> int:
    """Return how long a request's body may be; a document is read only from who has the key, else the error is raised."""
    if scope["method"] == "POST" and scope["path"] == PATH:
        check_key(scope)
        return config.max_document_bytes + FORM_BYTES
    return config.max_body_bytes


def router(service: Service) -> APIRouter:
    """Return the endpoints that change the documents."""
    routes = APIRouter(prefix=PATH, tags=["documents"], dependencies=[Depends(_check)], responses=OPENAI_PROBLEMS)

    @routes.post("", status_code=202)
    def add(
        file: Annotated[UploadFile, File(description="the document")],
        path: Annotated[str | None, Form(description="its name, with folders if wanted; the file's own if left out")] = None,
    ) -> Card:
        """Add a document, or replace the one that has its path; one that cannot be read is refused."""
        service.check_alone()
        name = path or file.filename
        if not name:
            raise BadRequest("the document has no name", "path, or a file name in the form")
        return _card(service.documents.add(name, file.file.read()))

    @routes.get("")
    def list_() -> Listing:
        """List the documents, and say whether the index that serves has them."""
        documents, retriever = service.documents, service.knowledge.retriever
        index, problem = retriever.index if retriever else None, documents.problem
        card = IndexCard(
            name=service.knowledge.name, generation=index.generation if index else None, chunks=len(index) if index else 0,
            documents=len(index.documents) if index else 0, syncing=documents.syncing,
            problem=openai_body(problem)["error"] if problem else None,
        )  # fmt: skip
        return Listing(data=[_card(entry) for entry in documents.entries()], index=card)

    @routes.get("/{path:path}")
    def show(path: str) -> Card:
        """Show one document."""
        return _card(service.documents.entry(path))

    @routes.delete("/{path:path}", status_code=202)
    def remove(path: str) -> Card:
        """Remove a document; the generation before the next one keeps its text on disk until the sync after."""
        service.check_alone()
        return _card(service.documents.remove(path))

    return routes


async def _check(request: Request) -> None:
    check_key(request.scope)


def _card(entry: Entry) -> Card:
    return Card(path=entry.path, source=entry.source, sha256=entry.sha256, bytes=entry.size, chunks=entry.chunks,
                status=entry.state, reason=entry.reason, next=NEXT[entry.state])  # fmt: skip
