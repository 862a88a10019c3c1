r"""Adapters over the API: add one from a run, put one in the place of another, list them, remove one; no request is lost.

    curl -s http://127.0.0.1:8000/v1/adapters -H "Authorization: Bearer $LLMLAB_ADMIN_KEY" \
        -H 'Content-Type: application/json' -d '{"run": "latest", "name": "faq"}'

The answer comes when requests can name the adapter. How a change is made is in `serving.adapters`.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.admin import check_key
from serving.engines.contract import Adapter
from serving.problems import OPENAI_PROBLEMS
from serving.service import Service
from serving.tuned import NAME, RUN_ID

PATH = "/v1/adapters"


class Wanted(BaseModel):
    """Which run is to be served, and as what."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: str = Field(pattern=f"^{RUN_ID}$", description="the id of a finetune run, an unambiguous beginning of it, or latest")
    name: str | None = Field(
        default=None, pattern=f"^{NAME}$", description="what a request's model will say; an adapter that has it is replaced"
    )


class Card(BaseModel):
    """An adapter that requests can name."""

    object: Literal["adapter"] = "adapter"
    name: str
    run: str
    created: str
    fingerprint: str


class Listing(BaseModel):
    """The adapters that are served.

    Attributes:
        changing: a change is under way, or requests still use what was served before the last one.
        requests_leaving: how many of these there are.
    """

    object: Literal["list"] = "list"
    data: list[Card]
    changing: bool
    requests_leaving: int


class Removed(BaseModel):
    """An adapter that new requests cannot name any more."""

    object: Literal["adapter"] = "adapter"
    name: str
    deleted: Literal[True] = True


def router(service: Service) -> APIRouter:
    """Return the endpoints that change which adapters are served."""
    routes = APIRouter(prefix=PATH, tags=["adapters"], dependencies=[Depends(_check)], responses=OPENAI_PROBLEMS)
    adapters = service.adapters

    @routes.post("", status_code=201)
    async def add(wanted: Wanted) -> Card:
        """Serve the adapter of a run; it is verified, loaded and asked something before requests can name it."""
        service.check_alone()
        return _card(await adapters.add(wanted.run, wanted.name))

    @routes.get("")
    async def list_() -> Listing:
        """List the adapters; /v1/models shows the passport of each."""
        return Listing(
            data=[_card(adapter) for adapter in adapters.served], changing=adapters.changing, requests_leaving=adapters.leaving
        )

    @routes.delete("/{name}")
    async def remove(name: str) -> Removed:
        """Serve an adapter no longer; requests that it is answering are answered to their end."""
        service.check_alone()
        return Removed(name=(await adapters.remove(name)).name)

    return routes


async def _check(request: Request) -> None:
    check_key(request.scope)


def _card(adapter: Adapter) -> Card:
    run = adapter.run
    return Card(name=adapter.name, run=run.id, created=run.created, fingerprint=run.fingerprint)
