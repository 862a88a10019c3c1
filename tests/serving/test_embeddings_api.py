"""Embeddings through OpenAI's client, against the index's own embedder."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serving.launch import Running

NAME = "minilm"


@pytest.fixture
def client(lab: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{lab.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_vectors_are_those_of_the_index(client: openai.OpenAI, lab: Running) -> None:
    texts = ["Vela is a language model.", "Kite is a vector database."]
    reply = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64 and decodes it
    numbers = client.embeddings.create(model=NAME, input=texts[0], encoding_format="float", dimensions=384).data[0].embedding
    expected = lab.service.knowledge.embedder().embed(texts)
    assert np.allclose([vector.embedding for vector in reply.data], expected, atol=1e-6)
    assert np.allclose(numbers, expected[0], atol=1e-6) and np.isclose(np.linalg.norm(numbers), 1, atol=1e-5)
    assert [vector.index for vector in reply.data] == [0, 1] and reply.model == NAME
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 10


def test_base64_is_little_endian_float32(http: httpx.Client) -> None:
    body = {"model": NAME, "input": "a", "encoding_format": "base64"}
    content = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert len(base64.b64decode(content)) == 4 * 384


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": ["a", 3]}, "input", ""),
        ({"input": []}, "input", "empty"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": ["a"] * 65}, "input", "at most 64"),
        ({"input": "word " * 2000}, "input", "at most"),
        ({"input": "x" * 140_000}, "input", "characters"),
        ({"dimensions": 128}, "dimensions", "384"),
        ({"encoding_format": "int8"}, "encoding_format", ""),
        ({"truncate": True}, "truncate", ""),
    ],
)
def test_what_is_refused_is_named(http: httpx.Client, fields: dict[str, Any], param: str, word: str) -> None:
    response = http.post("/v1/embeddings", json={"model": NAME, "input": "a"} | fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and word in error["message"], error


def test_models_lists_the_embedder_and_no_other_embeds(client: openai.OpenAI) -> None:
    card = client.models.retrieve(NAME)
    assert card.model_extra["task"] == "embed" and card.model_extra["passport"]["dimensions"] == 384
    with pytest.raises(openai.NotFoundError, match=NAME):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])
