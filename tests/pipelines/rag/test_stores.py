"""Vector stores: one contract for all of them, filters against their meaning, and copies to them and back.

Weaviate and Pinecone are their real clients against servers of ours that speak the protocol (weaviate_server.py and
pinecone_server.py): they were not run against the real service.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import ROOT, load, named
from pipelines.errors import ConfigError, DataError, FingerprintMismatch
from pipelines.rag.chunk import Chunk
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from pipelines.rag.stores import open_store
from pipelines.rag.stores.contract import UNFINISHED, Store, StoreError, StoreMissing, StoreStale
from pipelines.rag.stores.copying import copy_from, copy_to
from pipelines.rag.stores.local import Local
from pipelines.rag.stores.plain import EVERYTHING, NOTHING, Leaf, plain
from pipelines.rag.where import All, Comparison, Expression, Not, parse, record_of
from pipelines.rag.where import Any as AnyOf
from tests.pipelines.rag import pinecone_server, postgres_server

DIMENSION, COUNT = 16, 300
SOURCES = ("api/users.md", "api/v1/käse.md", "notes.txt", "a b/🚀 'quoted' \"text\".md", "50%_off\\n.md", "Ωmega.html")
WORDS = (
    "falcon",
    "Falcon",
    "naïve",
    "日本語",
    "🚀",
    "50%",
    "a_b",
    "it's",
    '"so"',
    "\\n",
    "[of]",
    "line\nbreak",
    "O'Hara",
    "ß",
    "",
)
REMOTE = [
    "qdrant",
    pytest.param("milvus", marks=pytest.mark.slow),
    pytest.param("pgvector", marks=pytest.mark.slow),
    pytest.param("weaviate", marks=pytest.mark.slow),
    pytest.param("pinecone", marks=pytest.mark.slow),
]

Opener = Callable[[], Store]


def id_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


def made_chunks(count: int = COUNT) -> list[Chunk]:
    drawn = random.Random(7)
    return [
        Chunk(id_of(n), drawn.choice(SOURCES), f"Title {drawn.choice(WORDS)} {n % 7}", " ".join(drawn.choices(WORDS, k=6)),
              n, n + 5, drawn.choice((None, 1, 2, 3, 12)), drawn.choice(("text", "pdf", "naïve")))
        for n in range(count)
    ]  # fmt: skip


def made_vectors(count: int, seed: int = 3, dimension: int = DIMENSION) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def facts_for(chunks: list[Chunk], **changed: Any) -> dict[str, Any]:
    return {
        "index": "lab", "generation": "g1", "created": "2026-01-01T00:00:00Z", "fingerprint": "f" * 64, "dimension": DIMENSION,
        "readers": 1, "docs": "döcs", "skipped": [], "config": {"stemmer": "english", "chunk_max_tokens": 48},
        "documents": {c.source: hashlib.sha256(c.source.encode()).hexdigest() for c in chunks}, "chunks": [c.id for c in chunks],
    } | changed  # fmt: skip


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty store of the kind that the test asks for."""
    kind = request.param
    if kind == "qdrant":
        pytest.importorskip("qdrant_client", reason="make setup-stores")
        return f"qdrant:{tmp_path / 'store'}"
    found: str = request.getfixturevalue(f"{kind}_url")
    return found


@pytest.fixture
def milvus_url(tmp_path: Path) -> str:
    return f"milvus:{tmp_path / 'store.db'}"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server.running() as folder:
        yield folder


@pytest.fixture
def pgvector_url(postgres: str, tmp_path: Path) -> str:
    return f"postgresql://postgres@/postgres?host={postgres}&table=T-{id_of(hash(tmp_path))}"


@pytest.fixture
def pinecone_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    dimension = DIMENSION if "opener" in request.fixturenames else 64
    with pinecone_server.running(pinecone_server.app(dimension)) as port:
        monkeypatch.setenv("PINECONE_API_KEY", "test-key")
        monkeypatch.setenv("PINECONE_HOST", f"http://127.0.0.1:{port}")
        yield "pinecone:lab"


@pytest.fixture
def weaviate_url() -> Iterator[str]:
    from tests.pipelines.rag import weaviate_server  # needs the client's own protocol files

    with weaviate_server.running() as (rest, grpc):
        yield f"weaviate+http://127.0.0.1:{rest}/lab?grpc={grpc}"


@pytest.fixture(params=["local", *REMOTE])
def opener(request: pytest.FixtureRequest, tmp_path: Path, config: RagConfig, hash_embedder: Any) -> Iterator[Opener]:
    """Return what opens the same, at first empty, store again and again."""
    if request.param == "local":
        embedder = type(hash_embedder)(dimension=DIMENSION)

        def local() -> Store:
            from pipelines.rag.index import usable

            return Local("lab", embedder, config, usable("lab", embedder), lambda *_: None)

        yield local
        return
    where = f"qdrant:{tmp_path / 'store'}" if request.param == "qdrant" else request.getfixturevalue(f"{request.param}_url")
    if request.param == "qdrant":
        pytest.importorskip("qdrant_client", reason="make setup-stores")
    opened: list[Store] = []

    def again() -> Store:
        opened.append(open_store(where))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


@pytest.fixture
def filled(opener: Opener) -> Store:
    store, chunks = opener(), made_chunks()
    store.upsert(chunks, made_vectors(COUNT))
    store.set_facts(facts_for(chunks))
    return store


def exact(chunks: list[Chunk], rows: np.ndarray, vector: np.ndarray, k: int, where: Expression | None = None) -> dict[str, float]:
    matching = [n for n, c in enumerate(chunks) if where is None or where.matches(record_of(c))]
    scores = rows[matching] @ vector
    return {chunks[matching[n]].id: float(scores[n]) for n in np.argsort(-scores)[:k]}


def same(found: list[tuple[str, float]], expected: dict[str, float], *about: object) -> None:
    """Hold hits to an exact search; those that lie equally near may change places."""
    assert len({one for one, _ in found}) == len(found) == len(expected), about
    for (one, score), (other, right) in zip(found, expected.items(), strict=True):
        assert one == other or abs(expected.get(one, score) - right) < 1e-5, about
    np.testing.assert_allclose([score for _, score in found], list(expected.values()), atol=1e-4)


def random_expression(drawn: random.Random, depth: int = 0) -> Expression:
    choice = drawn.random()
    if depth < 4 and choice < 0.45:
        parts = tuple(random_expression(drawn, depth + 1) for _ in range(drawn.randint(1, 3)))
        return (All(parts), AnyOf(parts), Not(parts[0]))[drawn.randrange(3)]
    field = drawn.choice(("source", "title", "text", "page", "page", "kind", "id"))
    operator = drawn.choice(("=", "!=", "<", "<=", ">", ">=", "like", "contains", "="))
    texts = (
        *SOURCES,
        *WORDS,
        id_of(1),
        id_of(2),
        "zzz",
        "api/*",
        "*a?b*",
        "*%*",
        "T*",
        "?itle*",
        "*",
        "*\\*",
        "Title ß 3",
        "50\0",
    )
    numbers = (1, 2, 3, 2.5, 3.0, -1, 12, 10**20, 1e300, True, False)
    values: tuple[Any, ...]
    if operator in ("like", "contains"):
        values = (drawn.choice(texts),)
    else:
        kinds = numbers if (field == "page") != (drawn.random() < 0.1) else texts
        values = tuple(drawn.choice(kinds) for _ in range(drawn.randint(1, 3) if operator == "=" else 1))
    return Comparison(field, operator, values)


def test_hits_and_cosines_are_those_of_an_exact_search(filled: Store) -> None:
    chunks, rows = made_chunks(), made_vectors(COUNT)
    for vector in made_vectors(5, seed=9):
        for k in (1, 10, COUNT, COUNT + 50):
            same(filled.search(vector, k), exact(chunks, rows, vector, k))


def test_k_come_whenever_k_match_and_only_those_that_match(filled: Store) -> None:
    chunks, rows, drawn = made_chunks(), made_vectors(COUNT), random.Random(11)
    vectors = made_vectors(150, seed=10)
    for number, vector in enumerate(vectors):
        expression, k = random_expression(drawn), drawn.choice((1, 5, 40, COUNT))
        found = filled.search(vector, k, expression)
        same(found, exact(chunks, rows, vector, k, expression), number, expression, plain(expression))


def test_several_threads_search_at_once(filled: Store) -> None:
    vectors = made_vectors(40, seed=21)

    def searched(number: int) -> list[tuple[str, float]]:
        return filled.search(vectors[number], 7, parse(f"page = {number % 3 + 1} or text contains 'ß'"))

    alone = [searched(number) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(searched, range(40))) == alone


def test_a_chunk_takes_the_place_of_the_one_with_its_id(filled: Store) -> None:
    chunks, rows = made_chunks(), made_vectors(COUNT)
    new = replace(chunks[4], text="Neuer Text", page=None, start=90)
    rows[4] = made_vectors(1, seed=77)[0]
    filled.upsert([new], rows[4:5])
    filled.set_facts(facts_for(chunks))
    assert dict((c.id, c) for c, _ in filled.chunks())[new.id] == new
    assert filled.ids() == {c.id for c in chunks}
    assert filled.search(rows[4], 1)[0][0] == new.id
    assert filled.search(rows[4], 5, parse('text = "Neuer Text"'))[0][0] == new.id
    assert new.id not in [one for one, _ in filled.search(rows[4], COUNT, parse("page >= 0"))]


def test_what_is_deleted_is_gone(filled: Store, opener: Opener) -> None:
    chunks, rows = made_chunks(), made_vectors(COUNT)
    gone = {c.id for c in chunks[:100]}
    filled.delete([*gone, id_of(9999)])
    filled.set_facts(facts_for(chunks[100:]))
    for store in (filled, opener()):
        assert store.ids() == {c.id for c in chunks[100:]}
        assert {c.id for c, _ in store.chunks()} == store.ids()
        same(store.search(rows[0], COUNT), exact(chunks[100:], rows[100:], rows[0], COUNT))


def test_everything_is_there_when_it_is_opened_again(filled: Store, opener: Opener) -> None:
    chunks, rows = made_chunks(), made_vectors(COUNT)
    facts = filled.facts()
    filled.close()
    store = opener()
    held = {c.id: (c, vector) for c, vector in store.chunks()}
    assert [held[c.id][0] for c in chunks] == chunks
    np.testing.assert_array_equal(np.stack([held[c.id][1] for c in chunks]), rows)
    assert store.facts() == facts
    same(store.search(rows[8], 20), exact(chunks, rows, rows[8], 20))


def test_an_empty_store_answers(opener: Opener) -> None:
    store = opener()
    assert store.facts() is None and store.ids() == set() and list(store.chunks()) == []
    assert store.search(made_vectors(1)[0], 3) == [] == store.search(made_vectors(1)[0], 3, parse("page = 1"))
    store.delete(["0123456789abcdef"])
    store.upsert([], np.zeros((0, DIMENSION), dtype=np.float32))
    assert opener().facts() is None


def test_vectors_of_another_dimension_are_refused(filled: Store) -> None:
    with pytest.raises(FingerprintMismatch, match=f"holds vectors of {DIMENSION} dimensions, and 8 came"):
        filled.upsert(made_chunks(1), made_vectors(1, dimension=8))
    with pytest.raises(FingerprintMismatch, match=f"vectors of {DIMENSION} dimensions"):
        filled.search(made_vectors(1, dimension=8)[0], 3)
    with pytest.raises(DataError, match="1 chunks came with vectors of shape"):
        filled.upsert(made_chunks(1), made_vectors(2))


@pytest.mark.parametrize("opener", REMOTE, indirect=True)
def test_facts_are_replaced_whole_however_long_they_are(opener: Opener) -> None:
    store, chunks = opener(), made_chunks(8000)
    long = facts_for(chunks)
    for facts in (long, facts_for(chunks[:3]), {**long, UNFINISHED: True}, None):
        store.set_facts(facts)
        assert store.facts() == facts
        assert opener().facts() == facts


@pytest.mark.parametrize("opener", REMOTE, indirect=True)
def test_half_written_facts_are_no_facts(opener: Opener) -> None:
    store: Any = opener()
    store.set_facts(facts_for(made_chunks(8000)))
    pieces = store._pieces()
    assert len(pieces) > 2
    store._set_pieces([*pieces[:1], pieces[1].replace("a", "b"), *pieces[2:]])
    assert opener().facts() == {UNFINISHED: True}


def test_plain_expressions_match_the_same_chunks() -> None:
    drawn, records = random.Random(5), [record_of(c) for c in made_chunks()]
    for _ in range(600):
        expression = random_expression(drawn)
        asked = plain(expression)
        assert [asked.matches(r) for r in records] == [expression.matches(r) for r in records], (expression, asked)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("page < 3.5", Leaf("page", "<", (4,))),
        ("page > 3.5", Leaf("page", ">", (3,))),
        ("page = 3.0", Leaf("page", "in", (3,))),
        ("not page > 3", AnyOf((Leaf("page", "absent"), Leaf("page", "<=", (3,))))),
        ('page = "3"', NOTHING),
        ('page != "3"', Leaf("page", "present")),
        ('source != 3 or page = "x"', EVERYTHING),
        ('not source like "a*"', Leaf("source", "unlike", ("a*",))),
        ('(page = 1 or page > 2) or page = 2.5', AnyOf((Leaf("page", "in", (1,)), Leaf("page", ">", (2,))))),
        ("page < 99999999999999999999", Leaf("page", "present")),
    ],
)  # fmt: skip
def test_plain_expressions_have_no_not_and_no_value_of_another_kind(expression: str, expected: Expression) -> None:
    assert plain(parse(expression)) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing", "'no scheme' begins the store's URL(.|\n)*one of qdrant, "),
        ("redis://host/x", "'redis' begins the store's URL"),
        ("qdrant:", "has no folder(.|\n)*qdrant:FOLDER"),
        ("qdrant+http://host/", "'' cannot name a collection"),
        ("qdrant+http://host/a.b", "'a.b' cannot name a collection(.|\n)*a letter, then at most 47"),
        ("qdrant+http://user:hunter2@host/a", "holds a secret(.|\n)*export QDRANT_API_KEY="),
        ("qdrant+http://host:x/a", "cannot be read"),
        ("postgresql://me:hunter2@host/db?table=a", "holds a secret(.|\n)*export PGPASSWORD="),
        ("postgresql://me@host/db?table=a&password=hunter2", "holds a secret"),
        ("pinecone:a?api_key=hunter2", "holds a secret(.|\n)*export PINECONE_API_KEY="),
    ],
)
def test_a_url_that_cannot_be_is_refused_and_no_secret_is_shown(url: str, message: str) -> None:
    pytest.importorskip("qdrant_client", reason="make setup-stores")
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_a_store_that_does_not_answer_is_a_clear_problem() -> None:
    pytest.importorskip("qdrant_client", reason="make setup-stores")
    with pytest.raises(StoreError, match="qdrant.http://127.0.0.1:9/lab failed(.|\n)*start it"):
        open_store("qdrant+http://127.0.0.1:9/lab").facts()


@pytest.mark.slow
@pytest.mark.parametrize(
    "url",
    [
        "milvus+http://127.0.0.1:9/lab",
        "postgresql://u@127.0.0.1:9/db?table=lab",
        "weaviate+http://127.0.0.1:9/lab",
        "pinecone:lab",
    ],
)
def test_no_store_that_does_not_answer_is_a_surprise(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", "key-hunter2")
    monkeypatch.setenv("PINECONE_HOST", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="does not answer") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its lock file open
def test_a_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client", reason="make setup-stores")
    url = f"qdrant:{tmp_path / 'store'}"
    store, beside = open_store(url), open_store(url)
    store.set_facts(facts_for(made_chunks(3)))
    store.close()
    assert beside.facts() == facts_for(made_chunks(3))
    beside.close()
    with (tmp_path / "store" / ".lock").open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process has the folder"):
            open_store(url)
    open_store(url).close()


@pytest.mark.parametrize("url", REMOTE, indirect=True)
def test_a_copy_there_and_back_finds_the_same(url: str, docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    sync(docs, "lab", config, hash_embedder)
    there = copy_to(url, "lab", config, hash_embedder, lambda *_: None)
    back = copy_from(url, "copy", config, hash_embedder, lambda *_: None)
    assert (there.sent, there.removed, back.sent, back.removed) == (7, 0, 7, 0)
    first, second = open_index("lab", hash_embedder), open_index("copy", hash_embedder)
    served = open_index("lab", hash_embedder, url)
    assert (first.chunks, first.documents) == (second.chunks, second.documents)
    np.testing.assert_array_equal(first.vectors.rows, second.vectors.rows)
    for question in ("Which licence?", "What draws dashboards?"):
        for weight in (0.0, 0.5, 1.0):
            for where in (None, 'source like "*.md"', "page > 1", 'not source = "falcon.md"'):
                shaped = config.model_copy(update={"dense_weight": weight})
                hits = [Retriever(i, hash_embedder, shaped).retrieve(question, 3, where).hits for i in (first, second, served)]
                assert hits[0] == hits[1]
                assert [h.chunk_id for h in hits[0]] == [h.chunk_id for h in hits[2]]
                assert [h.score for h in hits[2]] == pytest.approx([h.score for h in hits[0]], abs=1e-6)
    allowed = first.rows_where('source like "*.md"')
    vector = hash_embedder.embed(["x"])[0]
    assert served.nearest(vector, 2, allowed).rows.tolist() == first.nearest(vector, 2, allowed).rows.tolist()


@pytest.mark.parametrize("url", REMOTE, indirect=True)
def test_only_what_is_new_is_sent(url: str, docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    sync(docs, "lab", config, hash_embedder)
    copy_to(url, "lab", config, hash_embedder, lambda *_: None)
    sync(docs, "lab", config, hash_embedder)
    with pytest.raises(StoreStale, match="holds generation(.|\n)*llmlab index copy lab --to"):
        open_index("lab", hash_embedder, url)
    assert copy_to(url, "lab", config, hash_embedder, lambda *_: None).sent == 0
    (docs / "falcon.md").unlink()
    (docs / "cache.txt").write_text("In front now.\n\n" + (docs / "cache.txt").read_text())
    (docs / "new.txt").write_text("Something new.")
    sync(docs, "lab", config, hash_embedder)
    again = copy_to(url, "lab", config, hash_embedder, lambda *_: None)
    assert (again.sent, again.removed) == (2, 3)
    index = open_index("lab", hash_embedder, url)
    store = open_store(url)
    assert {c.id: c for c, _ in store.chunks()} == {c.id: c for c in index.chunks}
    store.close()


@pytest.mark.parametrize("url", REMOTE, indirect=True)
def test_an_interrupted_copy_is_recognised_and_goes_on(
    url: str, docs: Path, config: RagConfig, hash_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.rag.stores import copying

    monkeypatch.setattr(copying, "BATCH", 2)
    sync(docs, "lab", config, hash_embedder)

    def stop(_step: str, done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_to(url, "lab", config, hash_embedder, stop)
    for use in (
        lambda: open_index("lab", hash_embedder, url),
        lambda: copy_from(url, "copy", config, hash_embedder, lambda *_: None),
    ):
        with pytest.raises(StoreStale, match="only a part(.|\n)*llmlab index copy"):
            use()
    assert copy_to(url, "lab", config, hash_embedder, lambda *_: None).sent == 3
    assert len(open_index("lab", hash_embedder, url)) == 7


@pytest.mark.parametrize("url", ["qdrant"], indirect=True)
def test_a_store_of_something_else_is_refused(
    url: str, docs: Path, config: RagConfig, hash_embedder: Any, other_embedder: Any
) -> None:
    quiet = (config, hash_embedder, lambda *_: None)
    sync(docs, "lab", config, hash_embedder)
    copy_to(url, "lab", *quiet)
    sync(docs, "other", config, hash_embedder)
    with pytest.raises(ConfigError, match="holds index 'lab'"):
        copy_to(url, "other", *quiet)
    with pytest.raises(FingerprintMismatch, match="embedder ffffffffffff of 64 dimensions"):
        copy_from(url, "copy", config, other_embedder, lambda *_: None)
    sync(docs, "lab", config, other_embedder)
    with pytest.raises(FingerprintMismatch, match="another collection"):
        copy_to(url, "lab", config, other_embedder, lambda *_: None)
    store = open_store(url)
    store.set_facts(None)
    store.close()
    with pytest.raises(ConfigError, match="records and no facts"):
        copy_to(url, "lab", *quiet[:1], other_embedder, lambda *_: None)


@pytest.mark.parametrize("url", ["qdrant"], indirect=True)
def test_while_a_copy_runs_the_generation_before_is_searched(url: str, docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    sync(docs, "lab", config, hash_embedder)
    copy_to(url, "lab", config, hash_embedder, lambda *_: None)
    before = open_index("lab", hash_embedder, url)
    for n in range(30):
        (docs / f"new-{n}.txt").write_text(f"Something new: {n}.")
    sync(docs, "lab", config, hash_embedder)
    copy_to(url, "lab", config, hash_embedder, lambda *_: None)
    assert len(before.nearest(hash_embedder.embed(["x"])[0], 7).rows) == 7
    assert len(open_index("lab", hash_embedder, url)) == 37


@pytest.mark.parametrize(
    ("url", "library"),
    [
        ("qdrant:x", "qdrant_client"),
        ("milvus:x.db", "pymilvus"),
        ("postgresql://h/d?table=t", "psycopg"),
        ("weaviate+http://h/T", "weaviate"),
        ("pinecone:i", "pinecone"),
    ],
)
def test_a_missing_client_says_how_to_get_it(url: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(StoreMissing, match="is not installed(.|\n)*make setup-stores"):
        open_store(url)


@pytest.mark.parametrize("url", ["qdrant"], indirect=True)
def test_a_server_goes_on_with_the_generation_before_until_the_store_has_the_new_one(
    url: str, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.rag.embed import load_embedder
    from serving import knowledge

    monkeypatch.setattr(knowledge, "LOOK_SECONDS", 0.05)
    config = load(named("rag", "default"), RagConfig, [f"store={url}"])
    embedder = load_embedder(config.embedder)
    first = sync(docs, "lab", config, embedder).generation
    assert "holds no index" in knowledge.Knowledge("lab", config).summary
    copy_to(url, "lab", config, embedder, lambda *_: None)
    opened = knowledge.Knowledge("lab", config)
    (docs / "barsoom.md").write_text("# Barsoom\n\nBarsoom has 2 moons.\n", encoding="utf-8")
    second = sync(docs, "lab", config, embedder).generation

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert opened.require().retrieve("Who made it?", 2, 'source like "*.md"').hits
            assert time.monotonic() < deadline
            time.sleep(0.02)

    until(lambda: "a newer one cannot be opened" in opened.summary)
    assert f"generation {first}" in opened.summary and "llmlab index copy lab --to" in opened.summary
    copy_to(url, "lab", config, embedder, lambda *_: None)
    until(lambda: f"generation {second}" in opened.summary)
    assert "2 moons" in opened.require().retrieve("How many moons has Barsoom?", 1).hits[0].text


@pytest.mark.slow
@pytest.mark.parametrize("url", ["qdrant"], indirect=True)
def test_the_command_copies_there_and_back(url: str, docs: Path, index_folder: Path) -> None:
    def llmlab(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "labs", "index", *arguments]
        environment = os.environ | {"LLMLAB_INDEX": str(index_folder)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)

    assert llmlab("sync", str(docs)).returncode == 0
    for arguments in (("--to", url), ("knowledge", "--to", url), ("again", "--from", url)):
        done = llmlab("copy", *arguments)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["chunks"] == 7 and said["sent"] == (0 if arguments[0] == "knowledge" else 7)
    neither = llmlab("copy", "knowledge")
    assert neither.returncode == 2 and "--to URL or --from URL" in neither.stderr
    secret = llmlab("copy", "knowledge", "--to", "postgresql://lab:hunter2@127.0.0.1/lab?table=a")
    assert secret.returncode == 2 and "hunter2" not in secret.stdout + secret.stderr


@pytest.mark.slow
def test_a_large_table_is_searched_with_its_index(pgvector_url: str) -> None:
    store: Any = open_store(pgvector_url)
    chunks, rows = made_chunks(4000), made_vectors(4000)
    store.upsert(chunks, rows)
    store._run("ANALYZE {table}")
    with store._pool.connection() as connection:
        asked = f"EXPLAIN SELECT id FROM \"{store._table}\" ORDER BY vector <#> '{rows[0].tolist()}'::vector LIMIT 10"
        assert "_hnsw" in str(connection.execute(asked).fetchall())
    found = [len({one for one, _ in store.search(v, 10)} & set(exact(chunks, rows, v, 10))) for v in made_vectors(20, seed=5)]
    assert np.mean(found) >= 9
    assert len(store.search(rows[0], 10, parse('text like "*Falcon*" and page = 12'))) == 10
    store.delete([c.id for c in chunks[:3990]])
    assert len(store.search(rows[0], 10)) == 10
    store.close()
