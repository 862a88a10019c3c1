"""Weaviate: a collection for the chunks and one for the facts, through REST and gRPC.

Filters are told to it, except patterns, `contains` and the order of texts. Its own comparison of texts trims and cuts them,
so each text has its sha256 beside it, and that is compared; whether a field is there stands in a field of its own. The
client was run against a server of ours that speaks the protocol, not against the real service.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast
from urllib.parse import SplitResult, parse_qs
from uuid import UUID

import numpy as np

from pipelines.errors import ConfigError
from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import Store, StoreError, checked_name, missing
from pipelines.rag.stores.plain import CannotSay, Leaf
from pipelines.rag.stores.remote import COLUMNS, Remote, chunk_of, fields_of, is_id

GRPC_PORT = 50051
_MAY_BE_ABSENT = tuple(field for field, (_, absent) in COLUMNS.items() if absent)
_RANGES = {"<": "less_than", "<=": "less_or_equal", ">": "greater_than", ">=": "greater_or_equal"}


def opened(parts: SplitResult) -> Store:
    """Open `weaviate+http(s)://HOST:PORT/COLLECTION`."""
    try:
        import weaviate
        from weaviate.classes.init import Auth
        from weaviate.exceptions import WeaviateBaseError
    except ImportError:
        raise missing("weaviate-client") from None
    name = checked_name(parts.path.strip("/"), "collection", hyphen=False)
    secure, key = parts.scheme.endswith("https"), os.environ.get("WEAVIATE_API_KEY")
    grpc = parse_qs(parts.query).get("grpc", [str(GRPC_PORT)])[0]
    if not grpc.isdigit():
        raise ConfigError(f"{grpc!r} is the gRPC port of the store's URL", "a number")
    address = f"weaviate+{'https' if secure else 'http'}://{parts.hostname}:{parts.port or 8080}"
    try:
        client = weaviate.connect_to_custom(
            http_host=parts.hostname or "", http_port=parts.port or 8080, http_secure=secure,
            grpc_host=parts.hostname or "", grpc_port=int(grpc), grpc_secure=secure,
            auth_credentials=Auth.api_key(key) if key else None,
            skip_init_checks=True,  # among them a look for newer versions of the client, on another server
        )  # fmt: skip
    except WeaviateBaseError as error:
        came = str(error).strip().splitlines()[0]
        raise StoreError(f"{address} does not answer: {came}", "a Weaviate server, with its key in WEAVIATE_API_KEY") from None
    return Weaviate(client, name[0].upper() + name[1:], f"{address}/{name}")


class Weaviate(Remote):
    """A collection, and another one for the facts.

    Args:
        client: of Weaviate.
        collection: its name, with a capital in front.
        shown: how the store is called in messages.
    """

    def __init__(self, client: Any, collection: str, shown: str) -> None:
        from weaviate.exceptions import WeaviateBaseError

        super().__init__(shown, (WeaviateBaseError,), client.close)
        self._client, self._name, self._about = client, collection, f"{collection}_facts"
        self._chunks, self._texts = client.collections.use(self._name), client.collections.use(self._about)

    def _pieces(self) -> list[str]:
        if not self._client.collections.exists(self._about):
            return []
        held = {one.uuid.int: str(one.properties["text"]) for one in self._texts.iterator(return_properties=["text"])}
        return [held[number] for number in sorted(held)]

    def _set_pieces(self, pieces: Sequence[str]) -> None:
        from weaviate.classes.config import Configure, DataType, Property
        from weaviate.classes.data import DataObject

        if not self._client.collections.exists(self._about):
            text = Property(name="text", data_type=DataType.TEXT, index_filterable=False, index_searchable=False)
            self._client.collections.create(self._about, properties=[text], vector_config=Configure.Vectors.self_provided())
        for number, piece in enumerate(pieces):
            self._insert(
                self._texts, [DataObject(properties={"text": piece}, uuid=UUID(int=number + 1))]
            )  # a scan begins after 0
        self._remove(self._texts, [one.uuid for one in self._texts.iterator(return_properties=[]) if one.uuid.int > len(pieces)])

    def _dimension(self) -> int | None:
        if not self._client.collections.exists(self._name):
            return None
        for one in self._chunks.query.fetch_objects(limit=1, include_vector=True, return_properties=[]).objects:
            return len(one.vector["default"])
        return None

    def _made(self, dimension: int) -> int:
        from weaviate.classes.config import Configure, VectorDistances

        if not self._client.collections.exists(self._name):
            dot = Configure.VectorIndex.hnsw(distance_metric=VectorDistances.DOT)
            self._client.collections.create(
                self._name, properties=_properties(), vector_config=Configure.Vectors.self_provided(vector_index_config=dot)
            )
        return self._dimension() or dimension

    def _ids(self) -> Iterator[str]:
        if self._dimension() is not None:
            yield from (_id(one.uuid) for one in self._chunks.iterator(return_properties=[]))

    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        from weaviate.classes.data import DataObject

        objects = []
        for chunk, vector in zip(chunks, vectors.tolist(), strict=True):
            held = {_named(field): value for field, value in fields_of(chunk).items()}
            hashes = {f"{field}_sha256": _sha256(value) for field, value in held.items() if isinstance(value, str)}
            given = {f"{field}_given": int(field in held) for field in _MAY_BE_ABSENT}
            objects.append(DataObject(properties=held | hashes | given, uuid=_uuid(chunk.id), vector=vector))
        self._insert(self._chunks, objects)

    def _insert(self, collection: Any, objects: list[Any]) -> None:
        done = collection.data.insert_many(objects)
        if done.has_errors:
            raise StoreError(f"{self.shown} refused {len(done.errors)} records: {next(iter(done.errors.values())).message}")

    def _drop(self, ids: Sequence[str]) -> None:
        self._remove(self._chunks, [_uuid(one) for one in ids])

    def _remove(self, collection: Any, uuids: list[UUID]) -> None:
        from weaviate.classes.query import Filter

        if uuids:
            collection.data.delete_many(where=Filter.by_id().contains_any(uuids))

    def _nearest(self, vector: np.ndarray, k: int, said: Any) -> list[tuple[str, float]]:
        from weaviate.classes.query import MetadataQuery

        found = self._chunks.query.near_vector(
            vector.tolist(), limit=k, filters=said, return_metadata=MetadataQuery(distance=True), return_properties=[]
        )
        return [(_id(one.uuid), -float(one.metadata.distance)) for one in found.objects]

    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        if self._dimension() is not None:
            wanted = [_named(field) for field in COLUMNS]
            for one in self._chunks.iterator(include_vector=vectors, return_properties=wanted):
                held = {field: one.properties.get(_named(field)) for field in COLUMNS}
                yield chunk_of(held), one.vector["default"] if vectors else None

    def _leaf(self, leaf: Leaf) -> Any:
        from weaviate.classes.query import Filter

        whole, absent = COLUMNS[leaf.field]
        held, given = Filter.by_property(_named(leaf.field)), Filter.by_property(f"{leaf.field}_given")
        if leaf.operator in ("present", "absent"):
            return given.equal(int(leaf.operator == "present"))
        if leaf.operator in _RANGES and whole:
            return getattr(held, _RANGES[leaf.operator])(leaf.values[0])
        if leaf.operator not in ("in", "not in"):
            raise CannotSay
        if leaf.field == "id" and leaf.operator == "in" and all(is_id(str(value)) for value in leaf.values):
            return Filter.by_id().contains_any([_uuid(str(value)) for value in leaf.values])
        compared = held if whole else Filter.by_property(f"{_named(leaf.field)}_sha256")
        values = [value if whole else _sha256(str(value)) for value in leaf.values]
        if leaf.operator == "in":
            return compared.contains_any(values)
        differs = [compared.not_equal(value) for value in values]
        return Filter.all_of([*differs, *([given.equal(1)] if absent else [])])

    def _every(self, parts: list[Any]) -> Any:
        from weaviate.classes.query import Filter

        return Filter.all_of(parts)

    def _some(self, parts: list[Any]) -> Any:
        from weaviate.classes.query import Filter

        return Filter.any_of(parts)


def _properties() -> list[Any]:
    """Return the fields of a chunk as Weaviate keeps them; of texts only the hashes are indexed."""
    from weaviate.classes.config import DataType, Property, Tokenization

    made = [Property(name=f"{field}_given", data_type=DataType.INT) for field in _MAY_BE_ABSENT]
    for field, (whole, _) in COLUMNS.items():
        name = _named(field)
        if whole:
            made.append(Property(name=name, data_type=DataType.INT))
        else:
            made.append(Property(name=name, data_type=DataType.TEXT, index_filterable=False, index_searchable=False))
            made.append(Property(name=f"{name}_sha256", data_type=DataType.TEXT, tokenization=Tokenization.FIELD,
                                 index_filterable=True, index_searchable=False))  # fmt: skip
    return made


def _named(field: str) -> str:
    """Return the name of a field there, where `id` is taken."""
    return "chunk_id" if field == "id" else field


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _uuid(chunk_id: str) -> UUID:
    return UUID(int=int(chunk_id, 16))


def _id(uuid: Any) -> str:
    return f"{cast('UUID', uuid).int:016x}"
