"""The retriever as chains of other libraries want it: LangChain's and LlamaIndex's; our own path goes through neither.

LangChain is always installed, LlamaIndex by `make setup-chains`. Runnable chains are in labs/chains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError
from pipelines.rag.index import Hit
from pipelines.rag.retrieve import Retriever

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from llama_index.core.retrievers import BaseRetriever as LlamaRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle


def as_langchain(retriever: Retriever, k: int) -> BaseRetriever:
    """Return the retriever as a LangChain `BaseRetriever`, for use in a chain.

    Its documents carry the text, the chunk id, and `source`, `title`, `page`, `score` and `cosine` as metadata.
    """
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class LabRetriever(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return [Document(hit.text, id=hit.chunk_id, metadata=_metadata(hit)) for hit in retriever.retrieve(query, k).hits]

    return LabRetriever()


def as_llamaindex(retriever: Retriever, k: int) -> LlamaRetriever:
    """Return the retriever as a LlamaIndex `BaseRetriever`, for use in a query engine.

    Its nodes carry the text, the chunk id, the score, and the metadata that `as_langchain` gives; a model is shown the text
    only.

    Raises:
        ConfigError: LlamaIndex is not installed.
    """
    try:
        from llama_index.core.retrievers import BaseRetriever as LlamaRetriever
        from llama_index.core.schema import NodeWithScore, TextNode
    except ModuleNotFoundError:
        raise ConfigError("LlamaIndex is not installed", "llama-index-core in .venv", "make setup-chains") from None

    class LabRetriever(LlamaRetriever):  # type: ignore[misc]
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return [_node(hit) for hit in retriever.retrieve(query_bundle.query_str, k).hits]

    def _node(hit: Hit) -> NodeWithScore:
        metadata = _metadata(hit)
        node = TextNode(id_=hit.chunk_id, text=hit.text, metadata=metadata, excluded_llm_metadata_keys=list(metadata))
        return NodeWithScore(node=node, score=hit.score)

    return LabRetriever()


def _metadata(hit: Hit) -> dict[str, Any]:
    return {"source": hit.source, "title": hit.title, "page": hit.page, "score": hit.score, "cosine": hit.cosine}
