"""OpenAI's embeddings API over the index's own embedder: the vectors that passages have in the index.

Texts are embedded as passages are; a text longer than the embedder reads is refused, never cut. Nothing is stored.

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").embeddings.create(model="minilm", input=["a text"])
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from pipelines.errors import DataError
from serving import limits
from serving.problems import OPENAI_PROBLEMS, BadRequest, Unsupported
from serving.requests import EmbeddingRequest
from serving.service import Service
from serving.visit import VISIT

if TYPE_CHECKING:
    import numpy as np


class Vector(BaseModel):
    """The vector of a text, of length 1: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts, as the embedder counts them."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    usage: EmbeddingUsage


def router(service: Service) -> APIRouter:
    """Return the endpoint that embeds."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=OPENAI_PROBLEMS)

    @routes.post("/embeddings")
    async def embed(body: EmbeddingRequest) -> Embeddings:
        """Make a vector of each text; the key is charged for their tokens."""
        texts = _checked(body, service)
        embedder = await run_in_threadpool(service.knowledge.embedder)
        if body.dimensions not in (None, embedder.dimension):
            raise Unsupported(f"{body.model} makes vectors of {embedder.dimension} numbers, and they are not shortened",
                              f"dimensions: {embedder.dimension}, or none", param="dimensions")  # fmt: skip
        tokens = await run_in_threadpool(lambda: sum(map(embedder.token_count, texts)))
        VISIT.get().reserve(tokens)
        try:
            vectors = await run_in_threadpool(embedder.embed, texts)
        except DataError as error:  # a text that is too long
            raise BadRequest(error.came, error.expected, "split it", param="input") from None
        VISIT.get().spend(tokens)
        data = [Vector(index=index, embedding=_encoded(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
        return Embeddings(data=data, model=body.model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))

    return routes


def _checked(body: EmbeddingRequest, service: Service) -> list[str]:
    """Return the texts; `BadRequest` for token ids, too many texts, or ones that are empty or no Unicode."""
    limits.check_model(body.model, (service.knowledge.embedder_name,))
    texts, most = body.texts, service.config.requests.max_embedding_inputs
    if not all(isinstance(text, str) for text in texts):
        raise Unsupported("input holds token ids, which are those of another tokenizer", "texts", param="input")
    if len(texts) > most:
        raise BadRequest(f"input has {len(texts)} texts", f"at most {most}", "send them in parts", param="input")
    limits.check_prompts(texts, service.config.requests, "input")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadRequest("input is not valid Unicode", "text", param="input") from None
    return texts


def _encoded(vector: np.ndarray[Any, Any], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
