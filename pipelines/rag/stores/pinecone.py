"""Pinecone: an index that is there, of the index's dimension and the metric dotproduct; chunks and facts in two namespaces.

Filters are told to it, except patterns, `contains` and the order of texts. What is written there can be seen only seconds
later. The client was run against a server of ours that speaks the protocol, not against the real service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult

import numpy as np

from pipelines.errors import ConfigError
from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import Store, StoreError, checked_name, missing
from pipelines.rag.stores.plain import CannotSay, Leaf
from pipelines.rag.stores.remote import COLUMNS, Remote, chunk_of, fields_of

CHUNKS, FACTS = "chunks", "facts"
FETCHED = 100  # records by their ids, which stand in the URL
WRITTEN = 64  # records in a request of at most 2 MB
_SAID = {"in": "$in", "not in": "$nin", "<": "$lt", "<=": "$lte", ">": "$gt", ">=": "$gte"}


def opened(parts: SplitResult) -> Store:
    """Open `pinecone:INDEX`."""
    try:
        from pinecone import Pinecone as Client
        from pinecone.errors import PineconeError
    except ImportError:
        raise missing("pinecone") from None
    name = checked_name(parts.path, "Pinecone index")
    key, host = os.environ.get("PINECONE_API_KEY"), os.environ.get("PINECONE_HOST", "")
    if not key:
        raise ConfigError("there is no key for Pinecone", "one in PINECONE_API_KEY", "export PINECONE_API_KEY=...")
    try:
        client = Client(api_key=key)
        index = client.index(host=host) if host else client.index(name)
        held = index.describe_index_stats()
    except PineconeError as error:
        raise StoreError(f"the Pinecone index {name!r} does not answer: {str(error).splitlines()[0]}",
                         "an index that is there and a key for it") from None  # fmt: skip
    if held.metric not in (None, "dotproduct"):
        raise ConfigError(f"the Pinecone index {name!r} has the metric {held.metric}", "the metric dotproduct")

    def end() -> None:
        index.close()
        client.close()

    return Pinecone(index, int(held.dimension or 0), f"pinecone:{name}", end)


class Pinecone(Remote):
    """An index of Pinecone.

    Args:
        index: the client's.
        size: dimension of its vectors.
        shown: how the store is called in messages.
        end: lets go of the client.
    """

    def __init__(self, index: Any, size: int, shown: str, end: Any) -> None:
        from pinecone.errors import PineconeError

        super().__init__(shown, (PineconeError,), end)
        self._index, self._size = index, size

    def _pieces(self) -> list[str]:
        held = {int(one): str(record.metadata["text"]) for one, record in self._records(FACTS)}
        return [held[number] for number in sorted(held)]

    def _set_pieces(self, pieces: Sequence[str]) -> None:
        there = list(self._listed(FACTS))
        anything = [1.0] + [0.0] * (self._size - 1)  # a vector may not be all zeros
        for number, piece in enumerate(pieces):
            record = {"id": f"{number:06}", "values": anything, "metadata": {"text": piece}}
            self._index.upsert(vectors=[record], namespace=FACTS)
        self._delete([one for one in there if int(one) >= len(pieces)], FACTS)

    def _dimension(self) -> int | None:
        return self._size

    def _made(self, dimension: int) -> int:  # noqa: ARG002
        return self._size

    def _ids(self) -> Iterator[str]:
        return self._listed(CHUNKS)

    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        records = [
            {"id": chunk.id, "values": values, "metadata": fields_of(chunk)}
            for chunk, values in zip(chunks, vectors.tolist(), strict=True)
        ]
        for at in range(0, len(records), WRITTEN):
            self._index.upsert(vectors=records[at : at + WRITTEN], namespace=CHUNKS)

    def _drop(self, ids: Sequence[str]) -> None:
        self._delete(ids, CHUNKS)

    def _delete(self, ids: Sequence[str], namespace: str) -> None:
        for at in range(0, len(ids), FETCHED):
            self._index.delete(ids=list(ids[at : at + FETCHED]), namespace=namespace)

    def _nearest(self, vector: np.ndarray, k: int, said: Any) -> list[tuple[str, float]]:
        found = self._index.query(vector=vector.tolist(), top_k=k, namespace=CHUNKS, filter=said)
        return [(match.id, float(match.score)) for match in found.matches]

    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        yield from ((chunk_of(record.metadata), record.values if vectors else None) for _, record in self._records(CHUNKS))

    def _records(self, namespace: str) -> Iterator[tuple[str, Any]]:
        ids = list(self._listed(namespace))
        for at in range(0, len(ids), FETCHED):
            yield from self._index.fetch(ids=ids[at : at + FETCHED], namespace=namespace).vectors.items()

    def _listed(self, namespace: str) -> Iterator[str]:
        for page in self._index.list(namespace=namespace):
            yield from (item.id for item in page.vectors)

    def _leaf(self, leaf: Leaf) -> Any:
        field, operator, values = leaf.field, leaf.operator, list(leaf.values)
        if operator in ("present", "absent"):
            return {field: {"$exists": operator == "present"}}
        if operator == "in" or (operator == "not in" and not COLUMNS[field][1]):
            return {field: {_SAID[operator]: values}}
        if operator == "not in":
            return {"$and": [{field: {"$exists": True}}, {field: {"$nin": values}}]}
        if operator in _SAID and isinstance(values[0], int):
            return {field: {_SAID[operator]: values[0]}}
        raise CannotSay

    def _every(self, parts: list[Any]) -> Any:
        return {"$and": parts}

    def _some(self, parts: list[Any]) -> Any:
        return {"$or": parts}
