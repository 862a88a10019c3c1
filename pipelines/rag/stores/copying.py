"""An index is copied to a store and back: only what the other side lacks, its facts last, so that a stop does no harm.

A chunk keeps its id while its text stays, and yet where it begins may change. So the chunks of a document whose sha256
has changed are all sent, and those of other documents only if their ids are not there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pipelines.errors import ConfigError, FingerprintMismatch
from pipelines.rag import generation
from pipelines.rag.chunk import Chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import Progress
from pipelines.rag.index import RagConfig, open_index, usable
from pipelines.rag.stores import open_store
from pipelines.rag.stores.contract import UNFINISHED, Facts, Store, StoreStale, whole
from pipelines.rag.stores.local import Local

BATCH = 256


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        generation: that was copied.
        chunks: that both sides have now.
        sent: chunks that went over.
        removed: chunks that the other side no longer has.
    """

    generation: str
    chunks: int
    sent: int
    removed: int
    seconds: float


def copy_to(url: str, name: str, config: RagConfig, embedder: Embedder, report: Progress) -> Copied:
    """Make a store hold an index.

    Args:
        url: of the store, see pipelines.rag.stores.
        name: of the index.
        config: of the index.
        embedder: that it was made with.
        report: called with a step, units done, units in all.

    Raises:
        UnknownName: there is no such index.
        ConfigError: the URL cannot be read, or the store holds something else.
        FingerprintMismatch: the store holds vectors of another embedder.
        StoreError: the store does not answer.
    """
    index = open_index(name, embedder)
    with closing(open_store(url)) as store:
        held = store.facts()
        if held is None and store.ids():
            raise ConfigError(f"the store {url} holds records and no facts of an index", "an empty collection, or a copy's own")
        if held and held.get("index", name) != name:
            raise ConfigError(f"the store {url} holds index {held['index']!r}", "a collection for each index")
        return _copied(Local(name, embedder, config, index, report), store, url, report)


def copy_from(url: str, name: str, config: RagConfig, embedder: Embedder, report: Progress) -> Copied:
    """Make an index of what a store holds; arguments and errors as of `copy_to`.

    Raises:
        StoreStale: the store holds no index, or only a part.
    """
    generation.folder_of(name)
    with closing(open_store(url)) as store:
        facts = whole(store.facts(), url, name)
        if (facts["fingerprint"], facts["dimension"]) != (embedder.fingerprint, embedder.dimension):
            raise _mismatch(url, facts, {"fingerprint": embedder.fingerprint, "dimension": embedder.dimension})
        return _copied(store, Local(name, embedder, config, usable(name, embedder), report), url, report)


def _copied(source: Store, target: Store, url: str, report: Progress) -> Copied:
    started = time.perf_counter()
    facts, before = source.facts(), target.facts()
    assert facts is not None
    if before and "fingerprint" in before and any(before[key] != facts[key] for key in ("fingerprint", "dimension")):
        raise _mismatch(url, before, facts)
    held, settled = target.ids(), _settled(before, facts)
    gone = held - set(facts["chunks"])
    sending = _Sending(target, {**facts, UNFINISHED: True, "documents": settled, "chunks": []})
    seen: set[str] = set()
    report("copy", 0, len(facts["chunks"]))
    for chunk, vector in source.chunks():
        seen.add(chunk.id)
        if chunk.id not in held or chunk.source not in settled:
            sending.add(chunk, vector)
        report("copy", len(seen), len(facts["chunks"]))
    if seen != set(facts["chunks"]):
        raise StoreStale(f"{len(seen)} chunks came, and the facts name {len(facts['chunks'])}", "the chunks that the facts name",
                         "copy the index to the store again")  # fmt: skip
    sending.finish(gone)
    if before != facts:
        target.set_facts(facts)
    return Copied(facts["generation"], len(seen), sending.sent, len(gone), time.perf_counter() - started)


class _Sending:
    """Sends chunks in batches; the facts say that the target is not whole before the first of them goes."""

    def __init__(self, target: Store, unfinished: Facts) -> None:
        self._target, self._unfinished, self._begun = target, unfinished, False
        self._batch: list[tuple[Chunk, np.ndarray]] = []
        self.sent = 0

    def add(self, chunk: Chunk, vector: np.ndarray) -> None:
        self._batch.append((chunk, vector))
        if len(self._batch) == BATCH:
            self._send()

    def finish(self, gone: set[str]) -> None:
        self._send()
        if gone:
            self._begin()
            self._target.delete(gone)

    def _begin(self) -> None:
        if not self._begun:
            self._target.set_facts(self._unfinished)
            self._begun = True

    def _send(self) -> None:
        if self._batch:
            self._begin()
            self._target.upsert([chunk for chunk, _ in self._batch], np.stack([vector for _, vector in self._batch]))
            self.sent += len(self._batch)
            self._batch.clear()


def _settled(before: Facts | None, facts: Facts) -> dict[str, str]:
    """Return the documents whose chunks are right wherever they are there: as they were, or not there before."""
    documents: Mapping[str, str] = facts["documents"]
    if before is None:
        return dict(documents)
    cut = [(one.get("format"), one.get("readers"), one.get("config", {}).get("chunk_max_tokens")) for one in (before, facts)]
    known = before.get("documents", {}) if cut[0] == cut[1] else {}
    whole = cut[0] == cut[1] and not before.get(UNFINISHED)
    return {source: sha for source, sha in documents.items() if known.get(source, sha if whole else None) == sha}


def _mismatch(url: str, held: Facts, wanted: Facts) -> FingerprintMismatch:
    said = [f"embedder {str(one['fingerprint'])[:12]} of {one['dimension']} dimensions" for one in (held, wanted)]
    return FingerprintMismatch(f"the store {url} holds vectors of {said[0]}", said[1], "another collection, or the same embedder")
