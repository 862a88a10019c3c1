"""A small Pinecone index for the tests: the data plane's REST protocol, with a filter language that is really evaluated.

It was written from the client and the public description, and not compared with the real service.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request

PAGE = 100  # ids in an answer


def matches(said: dict[str, Any], held: dict[str, Any]) -> bool:
    """Return whether metadata fits a filter."""
    for key, wanted in said.items():
        if key == "$and":
            fits = all(matches(part, held) for part in wanted)
        elif key == "$or":
            fits = any(matches(part, held) for part in wanted)
        else:
            fits = all(_fits(held.get(key), operator, value) for operator, value in wanted.items())
        if not fits:
            return False
    return True


def _fits(held: Any, operator: str, value: Any) -> bool:
    if operator == "$exists":
        return (held is not None) == value
    if operator == "$in":
        return held in value
    if operator == "$nin":
        return held not in value
    if operator not in ("$lt", "$lte", "$gt", "$gte") or not isinstance(value, int | float):
        raise HTTPException(400, f"{operator} with {value!r}")
    if not isinstance(held, int | float):
        return False
    return {"$lt": held < value, "$lte": held <= value, "$gt": held > value, "$gte": held >= value}[operator]


def app(dimension: int) -> FastAPI:
    """Return the server of an empty index."""
    served, held = FastAPI(), {}  # type: ignore[var-annotated]  # namespace -> id -> record

    @served.middleware("http")
    async def keyed(request: Request, go_on: Any) -> Any:
        assert request.headers["api-key"] == "test-key"
        return await go_on(request)

    @served.post("/describe_index_stats")
    def stats() -> dict[str, Any]:
        counts = {name: {"vectorCount": len(records)} for name, records in held.items()}
        return {"namespaces": counts, "dimension": dimension, "indexFullness": 0, "metric": "dotproduct",
                "totalVectorCount": sum(map(len, held.values()))}  # fmt: skip

    @served.post("/vectors/upsert")
    async def upsert(request: Request) -> dict[str, Any]:
        content = await request.body()
        body = await request.json()
        if len(content) > 2 * 2**20:
            raise HTTPException(413, "more than 2 MB")
        for record in body["vectors"]:
            if len(record["values"]) != dimension or not any(record["values"]):
                raise HTTPException(400, "the vector does not fit")
            if any(value is None for value in record["metadata"].values()) or len(str(record["metadata"]).encode()) > 40_960:
                raise HTTPException(400, "the metadata does not fit")
            held.setdefault(body.get("namespace", ""), {})[record["id"]] = record
        return {"upsertedCount": len(body["vectors"])}

    @served.post("/vectors/delete")
    async def delete(request: Request) -> dict[str, Any]:
        body = await request.json()
        for one in body["ids"]:
            held.get(body["namespace"], {}).pop(one, None)
        return {}

    @served.get("/vectors/list")
    def listed(namespace: str = "", limit: int = PAGE, paginationToken: str = "") -> dict[str, Any]:
        ids = sorted(one for one in held.get(namespace, {}) if one > paginationToken)
        more = {"pagination": {"next": ids[limit - 1]}} if len(ids) > limit else {}
        return {"vectors": [{"id": one} for one in ids[:limit]], "namespace": namespace, **more}

    @served.get("/vectors/fetch")
    def fetch(ids: list[str] = Query(), namespace: str = "") -> dict[str, Any]:  # noqa: B008
        there = held.get(namespace, {})
        return {"vectors": {one: there[one] for one in ids if one in there}, "namespace": namespace}

    @served.post("/query")
    async def query(request: Request) -> dict[str, Any]:
        body = await request.json()
        fitting = [r for r in held.get(body["namespace"], {}).values() if matches(body.get("filter") or {}, r["metadata"])]
        vector = np.array(body["vector"], dtype=np.float32)
        scored = [(float(np.array(record["values"], dtype=np.float32) @ vector), record["id"]) for record in fitting]
        best = sorted(scored, key=lambda one: -one[0])[: body["topK"]]
        return {"matches": [{"id": one, "score": score} for score, one in best], "namespace": body["namespace"]}

    return served


@contextmanager
def running(served: FastAPI) -> Iterator[int]:
    """Serve on a free port of this machine, and yield it."""
    server = uvicorn.Server(uvicorn.Config(served, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
