"""Milvus: a collection on a server, or a file with Milvus Lite, for one process at a time.

The search is exact (a FLAT index), filtered or not. Filters are told to it, except patterns and `contains`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import numpy as np

from pipelines.errors import ConfigError
from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import Store, StoreError, checked_name, missing
from pipelines.rag.stores.plain import CannotSay, Leaf
from pipelines.rag.stores.remote import COLUMNS, Remote, chunk_of, fields_of
from pipelines.rag.stores.shared import borrowed

COLLECTION = "chunks"  # in a file
PAGE = 1000  # records in an answer
LONGEST = 65_535  # bytes of a text
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def opened(parts: SplitResult) -> Store:
    """Open `milvus:FILE.db` or `milvus+http(s)://HOST:PORT/COLLECTION`."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError:
        raise missing("pymilvus") from None
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised as well
    if parts.scheme == "milvus":
        if not parts.path.endswith(".db"):
            raise ConfigError(f"the store's URL names the file {parts.path!r}", "milvus:FILE.db")
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)  # Lite's own server has no clock, and says so
        path = Path(parts.path).expanduser().resolve()
        try:
            client, end = borrowed(path, lambda: MilvusClient(str(path)), lambda one: _release(one, path))
        except MilvusException:
            raise StoreError(f"{path} cannot be opened", "a file of Milvus Lite that no other process has open",
                             "stop the other process, or use a Milvus server") from None  # fmt: skip
        return Milvus(client, COLLECTION, f"milvus:{parts.path}", end)
    collection = checked_name(parts.path.strip("/"), "collection", hyphen=False)
    address = f"{parts.scheme.partition('+')[2]}://{parts.hostname}:{parts.port or 19530}"
    try:
        client = MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""), timeout=10)
    except MilvusException as error:
        raise StoreError(f"milvus+{address} does not answer: {error.message}", "a Milvus server", "start it") from None
    return Milvus(client, collection, f"milvus+{address}/{collection}", client.close)


def _release(client: Any, path: Path) -> None:
    from milvus_lite.server_manager import server_manager_instance

    client.close()
    server_manager_instance.release_server(str(path))


class Milvus(Remote):
    """A collection, and another one for the facts.

    Args:
        client: of Milvus.
        collection: its name.
        shown: how the store is called in messages.
        end: lets go of the client.
    """

    def __init__(self, client: Any, collection: str, shown: str, end: Callable[[], None]) -> None:
        from pymilvus import MilvusException

        super().__init__(shown, (MilvusException,), end)
        self._client, self._name, self._about = client, collection, f"{collection}_facts"
        self._loaded: set[str] = set()

    def _there(self, name: str) -> bool:
        """Return whether there is a collection, which is loaded before it is first read."""
        if not self._client.has_collection(name):
            return False
        if name not in self._loaded:
            self._client.load_collection(name)
            self._loaded.add(name)
        return True

    def _pieces(self) -> list[str]:
        if not self._there(self._about):
            return []
        held = {record["number"]: str(record["text"]) for record in self._records(self._about, "number >= 0", ["number", "text"])}
        return [held[number] for number in sorted(held)]

    def _set_pieces(self, pieces: Sequence[str]) -> None:
        from pymilvus import DataType

        if not self._there(self._about):
            schema = self._client.create_schema(auto_id=False)
            schema.add_field("number", DataType.INT64, is_primary=True)
            schema.add_field("text", DataType.VARCHAR, max_length=LONGEST)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # there has to be one
            self._create(self._about, schema)
        for number, piece in enumerate(pieces):
            self._client.upsert(self._about, [{"number": number, "text": piece, "vector": [1.0, 0.0]}])
        self._client.delete(self._about, filter=f"number >= {len(pieces)}")

    def _create(self, name: str, schema: Any) -> None:
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        self._client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def _dimension(self) -> int | None:
        if not self._there(self._name):
            return None
        described = self._client.describe_collection(self._name)["fields"]
        return int(next(field["params"]["dim"] for field in described if field["name"] == "vector"))

    def _made(self, dimension: int) -> int:
        from pymilvus import DataType

        held = self._dimension()
        if held is None:
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
            for name, (whole, absent) in COLUMNS.items():
                if whole:
                    schema.add_field(name, DataType.INT64, nullable=absent)
                elif name == "id":
                    schema.add_field(name, DataType.VARCHAR, max_length=64, is_primary=True)
                else:
                    schema.add_field(name, DataType.VARCHAR, max_length=LONGEST, nullable=absent)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
            self._create(self._name, schema)
        return held or dimension

    def _ids(self) -> Iterator[str]:
        if self._dimension() is not None:
            yield from (record["id"] for record in self._records(self._name, 'id != ""', ["id"]))

    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        rows = [fields_of(chunk) | {"vector": vector} for chunk, vector in zip(chunks, vectors.tolist(), strict=True)]
        self._client.upsert(self._name, rows)

    def _drop(self, ids: Sequence[str]) -> None:
        self._client.delete(self._name, ids=list(ids))

    def _nearest(self, vector: np.ndarray, k: int, said: Any) -> list[tuple[str, float]]:
        found = self._client.search(self._name, [vector.tolist()], limit=k, filter=said or "", output_fields=["id"])
        return [(hit["id"], float(hit["distance"])) for hit in found[0]]

    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        if self._dimension() is not None:
            wanted = [*COLUMNS, *(["vector"] if vectors else [])]
            for record in self._records(self._name, 'id != ""', wanted):
                yield chunk_of(record), record.get("vector")

    def _records(self, collection: str, said: str, wanted: list[str]) -> Iterator[Any]:
        pages = self._client.query_iterator(collection, batch_size=PAGE, filter=said, output_fields=wanted)
        try:
            while page := pages.next():
                yield from page
        finally:
            pages.close()

    def _leaf(self, leaf: Leaf) -> Any:
        field, operator = leaf.field, leaf.operator
        values = ", ".join(_literal(value) for value in leaf.values)
        if operator == "in":
            return f"{field} in [{values}]"
        if operator == "not in":
            return f"({field} is not null and {field} not in [{values}])" if COLUMNS[field][1] else f"{field} not in [{values}]"
        if operator in ("present", "absent"):
            return f"{field} is {'not ' if operator == 'present' else ''}null"
        if operator in ("<", "<=", ">", ">="):
            return f"{field} {operator} {values}"
        raise CannotSay

    def _every(self, parts: list[Any]) -> Any:
        return f"({' and '.join(parts)})"

    def _some(self, parts: list[Any]) -> Any:
        return f"({' or '.join(parts)})"


def _literal(value: object) -> str:
    """Return a value as Milvus reads it."""
    if not isinstance(value, str):
        return str(value)
    said = "".join(_ESCAPES.get(character, character) for character in value)
    if any(character < " " for character in said):
        raise CannotSay
    return f'"{said}"'
