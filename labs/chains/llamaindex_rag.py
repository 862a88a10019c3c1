"""A LlamaIndex query engine over our index, with the running gateway as its model.

Run, beside `make serve`: .venv/bin/python -m labs.chains.llamaindex_rag "Who developed Falcon 40B?"
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from labs.ask import TIMEOUT_SECONDS, key_header, preferred
from pipelines.errors import LabError
from pipelines.rag.adapters import as_llamaindex
from pipelines.rag.answer import SYSTEM
from pipelines.rag.retrieve import Retriever

if TYPE_CHECKING:
    from llama_index.core.llms import CompletionResponse, CompletionResponseGen, LLMMetadata
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.schema import NodeWithScore, QueryBundle

TEMPLATE = "{context_str}\n\nQuestion: {query_str}"


def engine(retriever: Retriever, server: str, k: int = 3, max_tokens: int = 96) -> RetrieverQueryEngine:
    """Return a query engine that answers from the passages and cites them by their numbers.

    Args:
        retriever: of an open index.
        server: address of the gateway; the adapter answers, if there is one.
        k: passages for a question.
        max_tokens: longest answer.

    Raises:
        ConfigError: LlamaIndex is not installed.
        EngineError: nothing answers at that address.
    """
    passages = as_llamaindex(retriever, k)
    from llama_index.core import PromptTemplate
    from llama_index.core.query_engine import RetrieverQueryEngine

    return RetrieverQueryEngine.from_args(
        passages, llm=_model(server, max_tokens), response_mode="compact", text_qa_template=PromptTemplate(TEMPLATE),
        node_postprocessors=[_numbers()],
    )  # fmt: skip


def _model(server: str, max_tokens: int) -> Any:
    """Return the gateway as a model of LlamaIndex, whose own client of OpenAI's API wants an older release of that."""
    import httpx
    from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

    name = preferred(server)

    class Gateway(CustomLLM):  # type: ignore[misc]
        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name=name, num_output=max_tokens, context_window=4096)

        def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:  # noqa: ARG002
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
            body = {"model": name, "messages": turns, "temperature": 0, "max_tokens": max_tokens}
            url = f"{server}/v1/chat/completions"
            reply = httpx.post(url, json=body, headers=key_header(), timeout=TIMEOUT_SECONDS, trust_env=False).raise_for_status()
            return CompletionResponse(text=reply.json()["choices"][0]["message"]["content"])

        def stream_complete(self, prompt: str, formatted: bool = False, **more: Any) -> CompletionResponseGen:
            yield self.complete(prompt, formatted, **more)

    return Gateway()


def _numbers() -> Any:
    """Return what puts number and title before each passage, as in the prompts that the model was tuned on."""
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore

    class Numbers(BaseNodePostprocessor):  # type: ignore[misc]
        def _postprocess_nodes(
            self,
            nodes: list[NodeWithScore],
            query_bundle: QueryBundle | None = None,  # noqa: ARG002
        ) -> list[NodeWithScore]:
            def shown(number: int, node: Any) -> Any:
                line = " ".join(f"[{number}] {node.metadata['title']}: {node.text}".split())
                return node.model_copy(update={"text": line}) if hasattr(node, "text") else node

            return [NodeWithScore(node=shown(n, found.node), score=found.score) for n, found in enumerate(nodes, 1)]

    return Numbers()


def main(question: str) -> None:
    """Answer one question from the index `knowledge` and print the sources."""
    from serving.knowledge import open_knowledge
    from serving.settings import load_serve_config

    config = load_serve_config()
    retriever = open_knowledge(config.index, config.rag).require()
    answer = engine(retriever, f"http://{config.host}:{config.port}").query(question)
    print(answer)
    for found in answer.source_nodes:
        print(f"  {found.text[:100]} ({found.metadata['source']})")


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "Who developed Falcon 40B?")
    except LabError as error:
        sys.exit(str(error))
