"""Retrieval: the right passage comes first, bad questions are refused, threads and LangChain work."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import zscore

from pipelines.errors import ConfigError, DataError
from pipelines.rag.adapters import as_langchain, as_llamaindex
from pipelines.rag.embed import Embedder
from pipelines.rag.index import MAX_K, RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever


@pytest.fixture
def retriever(docs: Path, config: RagConfig, minilm: Embedder) -> Retriever:
    sync(docs, "lab", config, minilm)
    return Retriever(open_index("lab", minilm), minilm, config)


def test_the_right_passage_comes_first(retriever: Retriever) -> None:
    found = retriever.retrieve("How is Falcon 40B licensed?", 3)
    assert [hit.title for hit in found.hits][0] == "Falcon 40B > Origin and licence"
    assert "Apache 2.0" in found.hits[0].text and found.hits[0].source == "falcon.md"
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    assert found.embed_seconds > 0 and found.search_seconds > 0


@pytest.mark.parametrize("question", ["How is Falcon 40B licensed?", "licence", "What draws dashboards?"])
@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_words_and_vectors_are_weighed_by_their_standard_scores(retriever: Retriever, question: str, weight: float) -> None:
    """All chunks are candidates here, so that SciPy's scores of all of them give the order."""
    shaped = replace(retriever, config=retriever.config.model_copy(update={"dense_weight": weight}))
    index, vector = retriever.index, retriever.embedder.embed_questions([question])[0]
    cosines, words = index.vectors.rows @ vector, index.words.scores(question)
    expected = expit(weight * zscore(cosines) + (1 - weight) * zscore(words))
    hits = shaped.retrieve(question, len(index)).hits
    assert [hit.row for hit in hits] == np.argsort(-expected, kind="stable").tolist()
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)


def test_words_that_no_passage_has_leave_the_order_to_the_vectors(retriever: Retriever) -> None:
    hits = retriever.retrieve("zzyzx", 3).hits
    cosines = [hit.cosine for hit in hits]
    assert cosines == sorted(cosines, reverse=True) and 0 < hits[0].score < 1  # type: ignore[type-var]


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 10_000])
def test_k_outside_its_range_is_refused(retriever: Retriever, k: int) -> None:
    with pytest.raises(DataError, match=f"from 1 to {MAX_K}"):
        retriever.retrieve("What is a KV cache?", k)


def test_more_passages_than_there_are_give_all(retriever: Retriever) -> None:
    assert len(retriever.retrieve("What is a KV cache?", MAX_K).hits) == len(retriever.index)


@pytest.mark.parametrize(
    ("question", "message"),
    [("", "empty"), (" \n\t", "empty"), ("word " * 300, "302 tokens(.|\n)*at most 256"), ("\ud800", "not valid Unicode")],
)
def test_a_bad_question_is_refused(retriever: Retriever, question: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        retriever.retrieve(question, 3)


def test_threads_get_the_same_answers_as_one(retriever: Retriever) -> None:
    questions = ["How is Falcon licensed?", "When was Claude 2 launched?", "What draws dashboards?", "word " * 200] * 6

    def titles(question: str) -> list[str]:
        return [hit.chunk_id for hit in retriever.retrieve(question, 3).hits]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(titles, questions)) == [titles(question) for question in questions]


def test_langchain_uses_it_in_a_chain(retriever: Retriever) -> None:
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough

    documents = as_langchain(retriever, 2).invoke("What draws dashboards?")
    assert [d.id for d in documents] == [h.chunk_id for h in retriever.retrieve("What draws dashboards?", 2).hits]
    assert documents[0].metadata["source"] == "deep/monitor.html" and documents[0].metadata["title"] == "Prometheus > Dashboards"
    assert set(documents[0].metadata) == {"source", "title", "page", "score", "cosine"}

    prompt = ChatPromptTemplate.from_template("{context}\n{question}")
    chain = {"context": as_langchain(retriever, 1), "question": RunnablePassthrough()} | prompt
    assert "Grafana draws dashboards" in chain.invoke("What draws dashboards?").to_string()


def test_llamaindex_gets_the_same_passages(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_index.core", reason="LlamaIndex is not installed: make setup-chains")
    hits = retriever.retrieve("What draws dashboards?", 2).hits
    nodes = as_llamaindex(retriever, 2).retrieve("What draws dashboards?")
    assert [(n.node_id, n.score, n.text) for n in nodes] == [(h.chunk_id, h.score, h.text) for h in hits]
    assert nodes[0].metadata == as_langchain(retriever, 2).invoke("What draws dashboards?")[0].metadata
    monkeypatch.setitem(sys.modules, "llama_index.core.retrievers", None)
    with pytest.raises(ConfigError, match="LlamaIndex is not installed") as raised:
        as_llamaindex(retriever, 2)
    assert raised.value.next_command == "make setup-chains"
