"""The chains of labs/chains, against the real gateway, engine and index."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipelines.config import ROOT
from serving.launch import Running
from tests.serving.conftest import index_root, lab, said, tuned_run  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow
QUESTION = "Who made Vela?"


@pytest.fixture
def prompts(lab: Running, monkeypatch: pytest.MonkeyPatch) -> list[Any]:  # noqa: F811
    """Return the chat requests that reach the gateway's engine, as they come."""
    seen: list[Any] = []
    original = type(lab.service.upstream).complete

    async def complete(self: Any, body: Any, *path: str) -> Any:
        seen.append(body["messages"])
        return await original(self, body, *path)

    monkeypatch.setattr(type(lab.service.upstream), "complete", complete)
    return seen


def expected(lab: Running) -> list[dict[str, str]]:  # noqa: F811
    from pipelines.rag.answer import messages

    return messages(QUESTION, lab.service.knowledge.require().retrieve(QUESTION, 2).hits)


def test_a_langchain_chain_answers_through_the_gateway(lab: Running, prompts: list[Any]) -> None:  # noqa: F811
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: make setup-chains")
    from labs.chains.langchain_rag import chain

    made = chain(lab.service.knowledge.require(), lab.url, k=2, max_tokens=12)
    answer = made.invoke(QUESTION)
    assert answer and prompts == [expected(lab)]
    assert len(list(made.stream(QUESTION))) > 3  # in pieces


def test_a_llamaindex_engine_answers_through_the_gateway(lab: Running, prompts: list[Any]) -> None:  # noqa: F811
    pytest.importorskip("llama_index.core", reason="LlamaIndex is not installed: make setup-chains")
    from labs.chains.llamaindex_rag import engine

    answer = engine(lab.service.knowledge.require(), lab.url, k=2, max_tokens=12).query(QUESTION)
    assert str(answer) and [n.metadata["source"] for n in answer.source_nodes][0] == "vela.md"
    (sent,) = prompts
    assert [" ".join(t["content"].split()) for t in sent] == [" ".join(t["content"].split()) for t in expected(lab)]


@pytest.mark.parametrize("name", ["langchain_rag", "llamaindex_rag"])
def test_without_a_server_it_says_what_to_start(name: str, lab: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import importlib

    from pipelines.errors import EngineError

    module = importlib.import_module(f"labs.chains.{name}")
    build = module.chain if name == "langchain_rag" else module.engine
    with pytest.raises(EngineError, match="nothing answers"):
        build(lab.service.knowledge.require(), "http://127.0.0.1:9")
    monkeypatch.setenv("LLMLAB_INDEX", "/nonexistent")
    done = subprocess.run([sys.executable, "-m", f"labs.chains.{name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "make index" in done.stderr and "Traceback" not in done.stderr
