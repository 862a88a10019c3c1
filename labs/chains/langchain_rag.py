"""Retriever | prompt | model | parser in LangChain: our index, our prompt, the running gateway through ChatOpenAI.

Run, beside `make serve`: .venv/bin/python -m labs.chains.langchain_rag "Who developed Falcon 40B?"
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labs.ask import KEY_VARIABLE, preferred
from pipelines.errors import ConfigError, LabError
from pipelines.rag.adapters import as_langchain
from pipelines.rag.answer import messages
from pipelines.rag.retrieve import Retriever

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.runnables import Runnable


@dataclass(frozen=True)
class _Passage:
    title: str
    text: str


def chain(retriever: Retriever, server: str, k: int = 3, max_tokens: int = 96, model: str | None = None) -> Runnable[str, str]:
    """Return a chain from a question to its answer, which cites passages by their numbers.

    Args:
        retriever: of an open index.
        server: address of the gateway.
        k: passages for a question.
        max_tokens: longest answer.
        model: a name that it serves; if not given, the adapter answers, if there is one.

    Raises:
        ConfigError: langchain-openai is not installed.
        EngineError: nothing answers at that address.
    """
    import httpx
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough

    try:
        from langchain_openai import ChatOpenAI
    except ModuleNotFoundError:
        raise ConfigError("langchain-openai is not installed", "langchain-openai in .venv", "make setup-chains") from None
    key = os.environ.get(KEY_VARIABLE, "none")
    asked = ChatOpenAI(base_url=f"{server}/v1", api_key=key, model=model or preferred(server), temperature=0,
                       max_tokens=max_tokens, http_client=httpx.Client(trust_env=False))  # fmt: skip
    found = {"documents": as_langchain(retriever, k), "question": RunnablePassthrough()}
    made: Runnable[str, str] = found | RunnableLambda(_prompt) | asked | StrOutputParser()
    return made


def _prompt(asked: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the messages that the model was tuned on."""
    documents: list[Document] = asked["documents"]
    passages = [_Passage(d.metadata["title"], d.page_content) for d in documents]
    return [(turn["role"], turn["content"]) for turn in messages(asked["question"], passages)]


def main(question: str) -> None:
    """Answer one question from the index `knowledge`, token by token."""
    from serving.knowledge import open_knowledge
    from serving.settings import load_serve_config

    config = load_serve_config()
    retriever = open_knowledge(config.index, config.rag).require()
    for piece in chain(retriever, f"http://{config.host}:{config.port}").stream(question):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "Who developed Falcon 40B?")
    except LabError as error:
        sys.exit(str(error))
