"""Qdrant: a collection on a server, or a folder that the client library itself searches.

A folder is for one process at a time, and its files hold pickled Python objects, as Qdrant's client writes them: open only
folders that you wrote yourself. Filters are told to it, except patterns, `contains` and the order of texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult

import numpy as np

from pipelines.errors import ConfigError, NotWritable
from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import Store, StoreError, checked_name, missing
from pipelines.rag.stores.plain import CannotSay, Leaf
from pipelines.rag.stores.remote import Remote, chunk_of, fields_of, is_id
from pipelines.rag.stores.shared import borrowed

COLLECTION = "chunks"  # in a folder
PAGE = 1000  # records in an answer
_INDEXED = {"source": "keyword", "page": "integer"}  # what a server finds without a look at each record
_RANGES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


def opened(parts: SplitResult) -> Store:
    """Open `qdrant:FOLDER` or `qdrant+http(s)://HOST:PORT/COLLECTION`."""
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise missing("qdrant-client") from None
    if parts.scheme == "qdrant":
        if not parts.path:
            raise ConfigError("the store's URL has no folder", "qdrant:FOLDER")
        folder = Path(parts.path).expanduser().resolve()
        try:
            client, end = borrowed(
                folder, lambda: QdrantClient(path=str(folder), force_disable_check_same_thread=True), lambda one: one.close()
            )
        except RuntimeError:
            raise StoreError(f"another process has the folder {folder} open", "one process at a time",
                             "stop the other process, or use a Qdrant server") from None  # fmt: skip
        except OSError as error:
            raise NotWritable(f"the folder {folder} cannot be opened: {error.strerror}", "a folder that can be written") from None
        return Qdrant(client, COLLECTION, f"qdrant:{parts.path}", end, local=True)
    name = checked_name(parts.path.strip("/"), "collection")
    scheme = parts.scheme.partition("+")[2]
    address = f"{scheme}://{parts.hostname}:{parts.port or 6333}"
    client = QdrantClient(url=address, api_key=os.environ.get("QDRANT_API_KEY"), check_compatibility=False, timeout=30)
    return Qdrant(client, name, f"qdrant+{address}/{name}", client.close, local=False)


class Qdrant(Remote):
    """A collection, where the id of a chunk is a number of 64 bits, and another one for the facts.

    Args:
        client: of Qdrant.
        collection: its name.
        shown: how the store is called in messages.
        end: lets go of the client.
        local: whether it is a folder.
    """

    def __init__(self, client: Any, collection: str, shown: str, end: Callable[[], None], *, local: bool) -> None:
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        super().__init__(shown, (ApiException, QdrantException), end)
        self._client, self._name, self._about, self._local = client, collection, f"{collection}-facts", local

    def _pieces(self) -> list[str]:
        if not self._client.collection_exists(self._about):
            return []
        held = {int(record.id): str(record.payload["text"]) for record in self._records(self._about)}
        return [held[number] for number in sorted(held)]

    def _set_pieces(self, pieces: Sequence[str]) -> None:
        from qdrant_client import models

        if not self._client.collection_exists(self._about):
            self._client.create_collection(self._about, models.VectorParams(size=1, distance=models.Distance.DOT))
        for number, piece in enumerate(pieces):
            point = models.PointStruct(id=number, vector=[1.0], payload={"text": piece})
            self._client.upsert(self._about, [point], wait=True)
        rest = [record.id for record in self._records(self._about, with_payload=False) if record.id >= len(pieces)]
        if rest:
            self._client.delete(self._about, models.PointIdsList(points=rest), wait=True)

    def _dimension(self) -> int | None:
        if not self._client.collection_exists(self._name):
            return None
        return cast("int", self._client.get_collection(self._name).config.params.vectors.size)

    def _made(self, dimension: int) -> int:
        from qdrant_client import models

        held = self._dimension()
        if held is None:
            self._client.create_collection(self._name, models.VectorParams(size=dimension, distance=models.Distance.DOT))
            for field, kind in () if self._local else _INDEXED.items():
                self._client.create_payload_index(self._name, field, models.PayloadSchemaType(kind), wait=True)
        return held or dimension

    def _ids(self) -> Iterator[str]:
        if self._dimension() is not None:
            yield from (f"{record.id:016x}" for record in self._records(self._name, with_payload=False))

    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        from qdrant_client import models

        points = [
            models.PointStruct(id=int(chunk.id, 16), vector=vector.tolist(), payload=fields_of(chunk))
            for chunk, vector in zip(chunks, vectors, strict=True)
        ]
        self._client.upsert(self._name, points, wait=True)

    def _drop(self, ids: Sequence[str]) -> None:
        from qdrant_client import models

        self._client.delete(self._name, models.PointIdsList(points=[int(one, 16) for one in ids]), wait=True)

    def _nearest(self, vector: np.ndarray, k: int, said: Any) -> list[tuple[str, float]]:
        from qdrant_client import models

        filtered = said is not None and not self._local  # the graph of a server may miss what few chunks match
        exact = models.SearchParams(exact=True) if filtered else None
        found = self._client.query_points(
            self._name, query=vector.tolist(), limit=k, query_filter=said and models.Filter(must=[said]),
            search_params=exact, with_payload=False,
        )  # fmt: skip
        return [(f"{point.id:016x}", float(point.score)) for point in found.points]

    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        if self._dimension() is not None:
            yield from ((chunk_of(r.payload), r.vector) for r in self._records(self._name, with_vectors=vectors))

    def _records(self, collection: str, **wanted: bool) -> Iterator[Any]:
        place = None
        while True:
            records, place = self._client.scroll(collection, limit=PAGE, offset=place, **wanted)
            yield from records
            if place is None:
                return

    def _leaf(self, leaf: Leaf) -> Any:
        from qdrant_client import models

        field, operator, values = leaf.field, leaf.operator, list(leaf.values)
        if field == "id" and operator in ("in", "not in"):
            known = [int(str(value), 16) for value in values if is_id(str(value))]
            return _unless(operator == "in", models.HasIdCondition(has_id=known))
        if operator in ("in", "not in"):
            return _unless(operator == "in", models.FieldCondition(key=field, match=models.MatchAny(any=values)), field)
        if operator in ("present", "absent"):
            return _unless(operator == "absent", models.IsEmptyCondition(is_empty=models.PayloadField(key=field)))
        if operator in _RANGES and isinstance(values[0], int):
            return models.FieldCondition(key=field, range=models.Range(**{_RANGES[operator]: float(values[0])}))
        raise CannotSay

    def _every(self, parts: list[Any]) -> Any:
        from qdrant_client import models

        return models.Filter(must=parts)

    def _some(self, parts: list[Any]) -> Any:
        from qdrant_client import models

        return models.Filter(should=parts)


def _unless(holds: bool, condition: Any, field: str | None = None) -> Any:
    """Return the condition, or its opposite for records that have the field."""
    from qdrant_client import models

    if holds:
        return condition
    absent = [models.IsEmptyCondition(is_empty=models.PayloadField(key=field))] if field else []
    return models.Filter(must_not=[condition, *absent])
