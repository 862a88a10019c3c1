"""PostgreSQL with pgvector: a table for the chunks, with an HNSW index, and one for the facts.

Every filter is told to it, and a filtered search is exact. A search without a filter uses the index, and is exact as well
where the index gives too few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, parse_qsl, urlencode

import numpy as np

from pipelines.rag.chunk import Chunk
from pipelines.rag.stores.contract import Store, StoreError, checked_name, missing
from pipelines.rag.stores.plain import CannotSay, Leaf
from pipelines.rag.stores.remote import COLUMNS, Remote, chunk_of, fields_of

if TYPE_CHECKING:
    from psycopg.sql import Composed

MOST_INDEXED = 2000  # dimensions of an HNSW index
MOST_APPROXIMATE = 500  # hits of a search with it, which looks at twice as many, and at 1000 at most
PAGE = 1000  # records at a time
_LIKE = str.maketrans({"\\": "\\\\", "%": "\\%", "_": "\\_", "*": "%", "?": "_"})
_SAID = {
    "in": "{} = ANY({})", "not in": "{} <> ALL({})", "<": "{} < {}", "<=": "{} <= {}", ">": "{} > {}", ">=": "{} >= {}",
    "like": "{} LIKE {}", "unlike": "{} NOT LIKE {}", "contains": "strpos({}, {}) > 0", "lacks": "strpos({}, {}) = 0",
    "present": "{} IS NOT NULL", "absent": "{} IS NULL",
}  # fmt: skip


def opened(parts: SplitResult) -> Store:
    """Open `postgresql://USER@HOST/DATABASE?table=TABLE`."""
    try:
        import psycopg
        from psycopg_pool import ConnectionPool
    except ImportError:
        raise missing("psycopg") from None
    asked = dict(parse_qsl(parts.query))
    table = checked_name(asked.pop("table", ""), "table")
    address = parts._replace(query=urlencode(asked)).geturl()
    if not parts.netloc:
        address = address.replace(":", "://", 1) if "//" not in address else address
    try:
        psycopg.connect(address, connect_timeout=10).close()
    except psycopg.Error as error:
        came = str(error).strip().splitlines()[0]
        raise StoreError(
            f"PostgreSQL does not answer: {came}", "a database, with the password in PGPASSWORD", "start it"
        ) from None
    pool = ConnectionPool(address, min_size=0, max_size=8, open=True, kwargs={"autocommit": True}, timeout=30,
                          check=ConnectionPool.check_connection)  # fmt: skip
    return Pgvector(pool, table, f"table {table} of {parts.hostname or 'PostgreSQL'}{parts.path}")


class Pgvector(Remote):
    """A table, and another one for the facts.

    Args:
        pool: of connections.
        table: its name.
        shown: how the store is called in messages.
    """

    def __init__(self, pool: Any, table: str, shown: str) -> None:
        import psycopg
        from psycopg.sql import SQL, Identifier
        from psycopg_pool import PoolTimeout

        super().__init__(shown, (psycopg.Error, PoolTimeout), pool.close)
        self._pool, self._sql, self._name = pool, SQL, Identifier
        self._names = {"table": Identifier(table), "about": Identifier(f"{table}_facts"), "index": Identifier(f"{table}_hnsw"),
                       "columns": SQL(", ").join(map(Identifier, COLUMNS))}  # fmt: skip
        self._table = table

    def _run(self, text: str, values: Any = (), **more: Any) -> list[tuple[Any, ...]]:
        with self._pool.connection() as connection:
            found = connection.execute(self._sql(text).format(**self._names, **more), values)
            return found.fetchall() if found.description else []

    def _exists(self, table: str) -> bool:
        return self._run("SELECT to_regclass(%s) IS NOT NULL", (f'"{table}"',)) == [(True,)]

    def _pieces(self) -> list[str]:
        if not self._exists(f"{self._table}_facts"):
            return []
        return [text for (text,) in self._run("SELECT text FROM {about} ORDER BY number")]

    def _set_pieces(self, pieces: Sequence[str]) -> None:
        self._run("CREATE TABLE IF NOT EXISTS {about} (number integer PRIMARY KEY, text text NOT NULL)")
        with self._pool.connection() as connection, connection.transaction():
            connection.execute(self._sql("DELETE FROM {about}").format(**self._names))
            for number, piece in enumerate(pieces):
                connection.execute(self._sql("INSERT INTO {about} VALUES (%s, %s)").format(**self._names), (number, piece))

    def _dimension(self) -> int | None:
        asked = "SELECT atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'vector'"
        found = self._run(asked, (f'"{self._table}"',))
        return cast("int", found[0][0]) if found else None

    def _made(self, dimension: int) -> int:
        held = self._dimension()
        if held is not None:
            return held
        columns = [
            self._sql("{} {} {}").format(
                self._name(name),
                self._sql("bigint" if whole else 'text COLLATE "C"'),
                self._sql("PRIMARY KEY" if name == "id" else "" if absent else "NOT NULL"),
            )
            for name, (whole, absent) in COLUMNS.items()
        ]
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        self._run("CREATE TABLE {table} ({made}, vector vector({size}) NOT NULL)", made=self._sql(", ").join(columns),
                  size=self._sql(str(dimension)))  # fmt: skip
        if dimension <= MOST_INDEXED:
            self._run("CREATE INDEX {index} ON {table} USING hnsw (vector vector_ip_ops)")
        return dimension

    def _ids(self) -> Iterator[str]:
        if self._dimension() is not None:
            yield from (one for (one,) in self._run("SELECT id FROM {table}"))

    def _put(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        replaced = self._sql(", ").join(
            self._sql("{0} = EXCLUDED.{0}").format(self._name(name)) for name in (*COLUMNS, "vector") if name != "id"
        )
        places = self._sql(", ").join([self._sql("%s")] * len(COLUMNS))
        put = self._sql(
            "INSERT INTO {table} ({columns}, vector) VALUES ({places}, %s::vector) ON CONFLICT (id) DO UPDATE SET {replaced}"
        ).format(places=places, replaced=replaced, **self._names)
        rows = [
            [*(held.get(name) for name in COLUMNS), str(vector)]
            for held, vector in zip(map(fields_of, chunks), vectors.tolist(), strict=True)
        ]
        with self._pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(put, rows)

    def _drop(self, ids: Sequence[str]) -> None:
        self._run("DELETE FROM {table} WHERE id = ANY(%s)", (list(ids),))

    def _nearest(self, vector: np.ndarray, k: int, said: Composed | None) -> list[tuple[str, float]]:
        if said is None and k <= MOST_APPROXIMATE:
            found = self._ordered(
                vector, k, None, {"hnsw.iterative_scan": "strict_order", "hnsw.ef_search": str(max(100, 2 * k))}
            )
            if len(found) == k:
                return found
        return self._ordered(vector, k, said, {"enable_indexscan": "off"})

    def _ordered(self, vector: np.ndarray, k: int, said: Composed | None, settings: dict[str, str]) -> list[tuple[str, float]]:
        asked = self._sql(
            "SELECT id, -(vector <#> {vector}::vector) FROM {table} {where} ORDER BY vector <#> {vector}::vector LIMIT {k}"
        ).format(
            vector=str(vector.tolist()), k=k, where=self._sql("WHERE {}").format(said) if said else self._sql(""), **self._names
        )
        with self._pool.connection() as connection, connection.transaction():
            connection.execute("SELECT NULL::vector")  # the library that knows the settings is loaded by its first use
            for name, value in settings.items():
                connection.execute("SELECT set_config(%s, %s, true)", (name, value))
            return [(one, float(score)) for one, score in connection.execute(asked).fetchall()]

    def _scan(self, *, vectors: bool) -> Iterator[tuple[Chunk, Any]]:
        if self._dimension() is None:
            return
        wanted = self._sql("vector::real[]" if vectors else "NULL")
        asked = self._sql("SELECT {columns}, {wanted} FROM {table}").format(wanted=wanted, **self._names)
        with self._pool.connection() as connection, connection.transaction(), connection.cursor(name="scan") as cursor:
            cursor.itersize = PAGE
            for row in cursor.execute(asked):
                yield chunk_of(dict(zip(COLUMNS, row[:-1], strict=True))), row[-1]

    def _leaf(self, leaf: Leaf) -> Composed:
        if any(isinstance(value, str) and "\0" in value for value in leaf.values):
            raise CannotSay
        field, values = self._name(leaf.field), list(leaf.values)
        if leaf.operator in ("in", "not in"):
            kind = self._sql("bigint[]" if COLUMNS[leaf.field][0] else "text[]")
            said: Any = self._sql("{}::{}").format(values, kind)
        elif leaf.operator in ("like", "unlike"):
            said = str(values[0]).translate(_LIKE)
        else:
            said = values[0] if values else None
        return cast("Composed", self._sql(_SAID[leaf.operator]).format(*((field, said) if values else (field,))))

    def _every(self, parts: list[Any]) -> Any:
        return self._sql("({})").format(self._sql(" AND ").join(parts))

    def _some(self, parts: list[Any]) -> Any:
        return self._sql("({})").format(self._sql(" OR ").join(parts))
