"""A small Weaviate for the tests: REST for collections, gRPC for objects and searches, filters that are really evaluated.

It was written from the client and its protocol files, and not compared with the real service.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import grpc
import numpy as np
from fastapi import FastAPI, HTTPException, Request
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from weaviate.proto.v1 import base_pb2, batch_delete_pb2, batch_pb2, search_get_pb2, weaviate_pb2_grpc

from tests.pipelines.rag.pinecone_server import running as running_rest

VERSION = "1.34.0"
_OPERATORS = base_pb2.Filters


class Held:
    """Collections: the schema as it was sent, and (properties, vector) by uuid."""

    def __init__(self) -> None:
        self.schemas: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, dict[str, tuple[dict[str, Any], bytes]]] = {}

    def whole_numbers(self, collection: str) -> set[str]:
        return {p["name"] for p in self.schemas[collection]["properties"] if p["dataType"] == ["int"]}

    def matching(self, collection: str, said: Any) -> dict[str, tuple[dict[str, Any], bytes]]:
        filterable = {p["name"] for p in self.schemas[collection]["properties"] if p.get("indexFilterable", True)}
        held = self.objects[collection]
        return {one: held[one] for one in sorted(held) if said is None or _matches(said, one, held[one][0], filterable)}


def _matches(said: Any, uuid: str, properties: dict[str, Any], filterable: set[str]) -> bool:
    if said.operator in (_OPERATORS.OPERATOR_AND, _OPERATORS.OPERATOR_OR):
        parts = [_matches(part, uuid, properties, filterable) for part in said.filters]
        return all(parts) if said.operator == _OPERATORS.OPERATOR_AND else any(parts)
    name = said.target.property
    held = uuid if name == "_id" else properties.get(name)
    if said.operator == _OPERATORS.OPERATOR_IS_NULL:
        return (held is None) == said.value_boolean
    assert name == "_id" or name in filterable, name
    value = getattr(said, said.WhichOneof("test_value"))
    if said.operator == _OPERATORS.OPERATOR_CONTAINS_ANY:
        return held in list(value.values)
    if said.operator == _OPERATORS.OPERATOR_NOT_EQUAL:
        return bool(held != value)  # of an absent field, too
    if held is None:
        return False
    return bool({
        _OPERATORS.OPERATOR_EQUAL: held == value,
        _OPERATORS.OPERATOR_LESS_THAN: held < value, _OPERATORS.OPERATOR_LESS_THAN_EQUAL: held <= value,
        _OPERATORS.OPERATOR_GREATER_THAN: held > value, _OPERATORS.OPERATOR_GREATER_THAN_EQUAL: held >= value,
    }[said.operator])  # fmt: skip


class Servicer(weaviate_pb2_grpc.WeaviateServicer):  # type: ignore[misc]
    """Objects and searches."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def BatchObjects(self, request: Any, _context: Any) -> Any:
        for sent in request.objects:
            whole = self.held.whole_numbers(sent.collection)
            properties = MessageToDict(sent.properties.non_ref_properties)
            properties = {name: int(value) if name in whole else value for name, value in properties.items()}
            vector = sent.vectors[0].vector_bytes if sent.vectors else sent.vector_bytes
            self.held.objects[sent.collection][str(UUID(sent.uuid))] = (properties, vector)
        return batch_pb2.BatchObjectsReply(took=0.0)

    def BatchDelete(self, request: Any, _context: Any) -> Any:
        gone = self.held.matching(request.collection, request.filters)
        for one in gone:
            del self.held.objects[request.collection][one]
        return batch_delete_pb2.BatchDeleteReply(matches=len(gone), successful=len(gone))

    def Search(self, request: Any, _context: Any) -> Any:
        said = request.filters if request.HasField("filters") else None
        found = self.held.matching(request.collection, said)
        scored = [(0.0, one) for one in found if not request.after or one > request.after]
        if request.HasField("near_vector"):
            near = request.near_vector
            assert self.held.schemas[request.collection]["vectorConfig"]["default"]["vectorIndexConfig"]["distance"] == "dot"
            content = near.vectors[0].vector_bytes if near.vectors else near.vector_bytes
            vector = np.frombuffer(content, dtype=np.float32)
            scored = [(-float(np.frombuffer(found[one][1], dtype=np.float32) @ vector), one) for one in found]
            scored.sort()
        wanted, best = set(request.properties.non_ref_properties), scored[: request.limit]
        return search_get_pb2.SearchReply(
            results=[self._result(*found[one], one, distance, wanted, request.metadata) for distance, one in best]
        )

    def _result(self, properties: dict[str, Any], vector: bytes, uuid: str, distance: float, wanted: set[str], asked: Any) -> Any:
        result = search_get_pb2.SearchResult()
        result.metadata.id, result.metadata.id_as_bytes = uuid, UUID(uuid).bytes
        if asked.distance:
            result.metadata.distance, result.metadata.distance_present = distance, True
        if asked.vector or asked.vectors:
            result.metadata.vectors.add(
                name="default", vector_bytes=vector, type=base_pb2.Vectors.VectorType.VECTOR_TYPE_SINGLE_FP32
            )
        for name in wanted:
            value, field = properties.get(name), result.properties.non_ref_props.fields[name]
            if value is None:
                field.null_value = 0
            elif isinstance(value, int):
                field.int_value = value
            else:
                field.text_value = value
        return result


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says that it serves."""

    def Check(self, _request: Any, _context: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def app(held: Held) -> FastAPI:
    """Return the REST part."""
    served = FastAPI()

    @served.get("/v1/meta")
    def meta() -> dict[str, Any]:
        return {"version": VERSION, "hostname": "test", "modules": {}, "grpcMaxMessageSize": 10 * 2**20}

    @served.get("/v1/.well-known/{what}")
    def known(what: str) -> dict[str, Any]:
        if what == "openid-configuration":
            raise HTTPException(404)
        return {}

    @served.get("/v1/schema/{name}")
    def schema(name: str) -> dict[str, Any]:
        if name not in held.schemas:
            raise HTTPException(404)
        return held.schemas[name]

    @served.post("/v1/schema")
    async def create(request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        assert body["class"] not in held.schemas
        assert not {"id", "vector"} & {p["name"] for p in body["properties"]}
        held.schemas[body["class"]], held.objects[body["class"]] = body, {}
        return body

    return served


@contextmanager
def running() -> Iterator[tuple[int, int]]:
    """Serve on free ports of this machine; yield that of REST and that of gRPC."""
    held = Held()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 10 * 2**20)])
    weaviate_pb2_grpc.add_WeaviateServicer_to_server(Servicer(held), server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with running_rest(app(held)) as rest:
            yield rest, port
    finally:
        server.stop(0).wait()
