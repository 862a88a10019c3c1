"""OpenAI's API through OpenAI's own client, against the real gateway and engine."""

from __future__ import annotations

from collections.abc import Iterator
from json import dumps

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from pipelines.runs import Run
from serving.launch import Running
from tests.serving.conftest import MODEL, TUNED, metric, wait_until

CHAT = [{"role": "user", "content": "Write the numbers from one to ten."}]


@pytest.fixture
def client(lab: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{lab.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_models_carry_their_passport(client: openai.OpenAI, tuned_run: Run) -> None:
    base, tuned, embedder = client.models.list().data
    assert (base.id, tuned.id, embedder.id) == (MODEL, TUNED, "minilm")
    passport = client.models.retrieve(TUNED).model_extra["passport"]
    assert passport["run"] == tuned_run.id and passport["fingerprint"] == tuned_run.fingerprint
    assert passport["base"]["revision"] and not passport["rehearsal"] and tuned.created > 1.7e9


def test_model_chooses_base_or_adapter(client: openai.OpenAI) -> None:
    answers = {}
    for name in (MODEL, TUNED, MODEL):
        reply = client.chat.completions.create(model=name, messages=CHAT, max_tokens=10, temperature=0)
        assert reply.model == name and reply.usage.completion_tokens == 10
        assert answers.setdefault(name, reply.choices[0].message.content) == reply.choices[0].message.content
    assert answers[MODEL] != answers[TUNED]


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    options = {"model": TUNED, "messages": CHAT, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.usage is None for c in chunks), "usage was not asked for"


def test_the_client_parses_a_reply_into_a_class(client: openai.OpenAI) -> None:
    class Sum(BaseModel):
        total: int = Field(ge=1, le=9)

    reply = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Sum, max_tokens=32, temperature=0)
    assert 1 <= reply.choices[0].message.parsed.total <= 9


def test_text_completions_and_their_stream(client: openai.OpenAI) -> None:
    options = {"model": TUNED, "prompt": "One, two,", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options)
    assert whole.object == "text_completion" and whole.model == TUNED and whole.usage.completion_tokens == 6
    *chunks, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert last.choices == [] and last.usage == whole.usage


def test_langchains_client_works(lab: Running) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: make setup-chains")
    server = {"base_url": f"{lab.url}/v1", "api_key": "none"}
    model = langchain.ChatOpenAI(**server, model=MODEL, temperature=0, max_tokens=6, seed=1, n=1, top_p=0.9, stop=["zzz"])
    whole = model.invoke("Write the numbers from one to ten.")
    pieces = list(model.stream("Write the numbers from one to ten.", stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert whole.usage_metadata["output_tokens"] == sum((p.usage_metadata or {}).get("output_tokens", 0) for p in pieces) == 6
    schema = {"title": "sum", "type": "object", "properties": {"total": {"type": "integer", "minimum": 1, "maximum": 9}},
              "required": ["total"], "additionalProperties": False}  # fmt: skip
    asked = langchain.ChatOpenAI(**server, model=MODEL, temperature=0, max_tokens=32)
    assert 1 <= asked.with_structured_output(schema, method="json_schema").invoke("Two and two?")["total"] <= 9
    with pytest.raises(openai.BadRequestError, match="shows no tools"):
        asked.bind_tools([schema]).invoke("Two and two?")
    embedder = langchain.OpenAIEmbeddings(**server, model="minilm", check_embedding_ctx_length=False)
    assert len(embedder.embed_query("a text")) == 384


def test_usage_on_a_stream_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.usage.completion_tokens == 5 and last.choices == []


def test_an_unknown_model_lists_the_valid_ones(client: openai.OpenAI) -> None:
    for name in ("gpt-4", "../secret", ""):
        with pytest.raises(openai.NotFoundError, match=f"one of {MODEL}, {TUNED}") as caught:
            client.chat.completions.create(model=name, messages=CHAT)
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_prompt_longer_than_the_context_says_the_numbers(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"the prompt has 30\d\d tokens, the context holds 1024") as caught:
            client.chat.completions.create(model=MODEL, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"content": "no role"}]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 10**9},
        {"max_tokens": "5"},
        {"max_completion_tokens": 10**9},
        {"n": 1000},
        {"stream": "yes"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"stream_options": "all"},
    ],
)
def test_wrong_values_are_refused_in_openais_form(http: httpx.Client, wrong: dict[str, object]) -> None:
    body = dumps({"model": MODEL, "messages": CHAT, "max_tokens": 4} | wrong)  # ASCII, so that a surrogate gets through
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}'])
def test_a_body_that_is_no_request(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["temperature", "response_format"])
def test_not_a_number_is_refused(http: httpx.Client, field: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": float("nan")}}}
    body = {"model": MODEL, "messages": CHAT, field: form if field == "response_format" else float("nan")}
    response = http.post("/v1/chat/completions", content=dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused(http: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:  # no Content-Length: the gateway has to count
        for _ in range(40):
            yield b" " * 10_000

    json = {"Content-Type": "application/json"}
    for content in (b" " * 400_000, pieces()):
        response = http.post("/v1/chat/completions", content=content, headers=json)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_generation(lab: Running, http: httpx.Client, stream: bool) -> None:
    def cancelled() -> tuple[float, int]:
        """Count at the gateway, and in the engine's log: asking the engine would keep it from noticing."""
        log = lab.service.supervisor.log.read_text(encoding="utf-8")
        return metric(http, "llmlab_generation_requests_total", outcome="cancelled"), log.count("cancel task")

    gateway, engine = cancelled()
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 900, "stream": stream, "ignore_eos": True}
    with httpx.Client(base_url=lab.url, trust_env=False, timeout=60 if stream else 1) as leaving:
        try:
            with leaving.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                next(response.iter_bytes())
        except httpx.ReadTimeout:
            assert not stream
    wait_until(lambda: cancelled()[0] == gateway + 1, 20)
    wait_until(lambda: cancelled()[1] > engine, 20)
