"""The engine for remote models: for real against this project's own gateway, and its words for what providers answer."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pipelines import catalogue
from pipelines.errors import ConfigError, EngineError
from serving import engines
from serving.engines.contract import Launch
from serving.engines.provider import REMOTES, remote_model
from serving.launch import Running, running
from tests.serving.conftest import MODEL, TUNED, environment, serve_config

CHAT = [{"role": "user", "content": "Write the numbers from one to ten."}]
KEY = "sk-secret-of-the-test"


def test_the_model_comes_from_the_settings_or_from_the_catalogue() -> None:
    assert remote_model("gpt-4o", serve_config().provider).provider == "openai:gpt-4o"
    named = remote_model(MODEL, serve_config("provider.model=bedrock_converse:a.b-c-v1:0").provider)
    assert named.name == named.provider == "bedrock_converse:a.b-c-v1:0", "nothing is called by the name of another model"
    with pytest.raises(ConfigError, match=f"no provider for {MODEL}"):
        remote_model(MODEL, serve_config().provider)
    with pytest.raises(ConfigError, match="no remote model"):
        remote_model(MODEL, serve_config("provider.model=huggingface:some/model").provider)
    given = [model for model in catalogue.all_models() if model.provider]
    assert len(given) == 8
    for model in given:
        assert str(model.provider).partition(":")[0] in REMOTES and not model.runnable


@pytest.mark.parametrize(
    "wrong",
    ["model=gpt-4o", "model=../x:y", "model=openai:", "base_url=file:///etc/passwd", "base_url=https://user:word@host/v1",
     "base_url=https://host/v1?key=x"],
)  # fmt: skip
def test_settings_that_are_no_model_or_no_address(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"provider\."):
        serve_config(f"provider.{wrong}")


def test_the_command_holds_no_key(tmp_path: Path) -> None:
    settings = serve_config("provider.model=openai:m", "provider.base_url=https://host.example/v1").provider
    with environment(OPENAI_API_KEY=KEY):
        engine = engines.named("provider")
        launch = Launch("m", None, (), "127.0.0.1", 1, 512, 3, 2, False, tmp_path, provider=settings)
        command = engine.command(launch)
        assert {"--model=openai:m", "--base-url=https://host.example/v1", "--slots=3"} <= set(command)
        assert KEY not in str(command) + str(engine.environment(launch))


class Refusing(http.server.BaseHTTPRequestHandler):
    """A provider that answers with the status that is the model's name."""

    def do_POST(self) -> None:
        status = int(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"])
        content = json.dumps({"error": {"message": f"no, {self.headers['Authorization']}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


async def _post(url: str, model: str, body: dict[str, Any]) -> httpx.Response:
    from serving.engines.provider_api import RemoteModel, create_app

    app = create_app(RemoteModel(f"openai:{model}", url, 5.0, 2, "OPENAI_API_KEY"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        return await client.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 4} | body)


def post(url: str, model: str, **body: Any) -> tuple[int, dict[str, Any]]:
    import asyncio

    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: make setup-chains")
    with environment(OPENAI_API_KEY=KEY):
        answer = asyncio.run(_post(url, model, body))
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answered", "status", "words"),
    [
        ("401", 502, "set OPENAI_API_KEY in the environment"),
        ("403", 502, "refused the key (403)"),
        ("404", 502, "the provider has no openai:404"),
        ("429", 429, "limit of requests"),
        ("500", 502, "the provider answered 500"),
    ],
)
def test_what_a_provider_refuses_is_translated(refusing: str, answered: str, status: int, words: str, stream: bool) -> None:
    found, error = post(refusing, answered, stream=stream)
    assert found == status and words in error["message"] and KEY not in error["message"]
    assert error["retry_after_seconds"] == (7 if status == 429 else None)


def test_a_request_that_the_provider_finds_wrong_is_told_in_its_words(refusing: str) -> None:
    status, error = post(refusing, "400")
    assert status == 400 and "the provider refused the request" in error["message"]


def test_what_cannot_be_passed_on_to_every_provider_is_refused(refusing: str) -> None:
    for extra in ({"n": 2}, {"seed": 1}, {"response_format": {"type": "json_object"}}, {"logprobs": True}):
        status, error = post(refusing, "200", **extra)
        assert status == 400 and f"does not pass on {next(iter(extra))}" in error["message"]


def test_an_address_where_nobody_answers() -> None:
    status, error = post("http://127.0.0.1:9/v1", "m")
    assert status == 502 and "could not be asked" in error["message"]


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, environment(LLMLAB_INDEX=str(tmp_path / "none")):
        patch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(EngineError, match="OPENAI_API_KEY is not set") as caught:
            with running("gpt-4o", serve_config("engine=provider"), say=lambda _: None):
                raise AssertionError("it must not start")
    assert "export OPENAI_API_KEY" in caught.value.next_command


@pytest.mark.slow
def test_a_remote_model_answers_like_the_engine_behind_it(lab: Running, index_root: Path) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: make setup-chains")
    name, said = f"openai:{TUNED}", list[str]()
    config = serve_config("engine=provider", f"provider.model={name}", f"provider.base_url={lab.url}/v1")
    with ExitStack() as stack:
        stack.enter_context(environment(OPENAI_API_KEY="none", LLMLAB_INDEX=str(index_root)))
        remote = stack.enter_context(running(MODEL, config, say=said.append))
        ours, theirs = (
            stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)) for url in (remote.url, lab.url)
        )
        assert [model.id for model in ours.models.list()] == [name, "minilm"]
        options: dict[str, Any] = {"messages": CHAT, "max_tokens": 10, "temperature": 0}
        expected = theirs.chat.completions.create(model=TUNED, **options)
        found = ours.chat.completions.create(model=name, **options)
        assert found.choices[0].message.content == expected.choices[0].message.content
        assert found.choices[0].finish_reason == expected.choices[0].finish_reason == "length"
        assert found.usage and expected.usage and found.usage.total_tokens == expected.usage.total_tokens
        *pieces, last = ours.chat.completions.create(model=name, **options, stream=True, stream_options={"include_usage": True})
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected.choices[0].message.content
        assert len(pieces) > 5 and last.usage == found.usage
        with pytest.raises(openai.BadRequestError, match="does not pass on seed"):
            ours.chat.completions.create(model=name, **options, seed=3)
        with pytest.raises(openai.BadRequestError, match="the context holds 1024"):
            ours.chat.completions.create(model=name, messages=[{"role": "user", "content": "word " * 3000}])
        answer = httpx.post(f"{remote.url}/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 8}, timeout=60).json()
        assert answer["model"] == name and answer["usage"]["completion_tokens"] > 0
        assert httpx.get(f"{remote.url}/metrics/engine", trust_env=False).text == ""
    assert any("leave this machine" in line for line in said)
