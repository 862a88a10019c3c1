"""API keys: the file, the command line, and what the gateway lets each of them do."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from labs.cli import app
from pipelines.errors import ConfigError, UnknownName
from serving import keys
from serving.access import Access
from serving.launch import Running, running
from serving.problems import RateLimited
from serving.rates import Rates
from tests.serving.conftest import MODEL, environment, fake_service, metric, serve_config, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """A server that runs, and its file of keys, which the first test of it makes."""
    folder = tmp_path_factory.mktemp("keyed")
    with environment(LLMLAB_KEYS=str(folder / "keys.json")), fake_service(folder, "keys=keys.json") as client:
        yield client, folder / "keys.json"


@pytest.fixture
def keyed(server: tuple[httpx.Client, Path]) -> Iterator[tuple[httpx.Client, Path]]:
    """The same, with a key in the file; what a test does to the file is undone."""
    path = server[1]
    keys.create(path, "first", "user", None, None)
    yield server
    path.unlink(missing_ok=True)


def test_a_key_is_random_shown_once_and_stored_as_its_digest(path: Path) -> None:
    made = [keys.create(path, name, "user", None, None) for name in ("alice", "bob")]
    assert len(set(made)) == 2 and all(len(key) > 43 for key in made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(key in path.read_text() for key in made)
    assert [key.name for key in keys.read(path)] == ["alice", "bob"]
    keys.revoke(path, "alice")
    assert [key.name for key in keys.read(path)] == ["bob"] and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["", "Alice", "a/b", "../x", "a b", "-a", "a\n", "é", "a" * 65])
def test_a_name_that_cannot_be_one(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a key"):
        keys.create(path, name, "user", None, None)
    assert not path.exists()


def test_names_that_are_taken_or_unknown(path: Path) -> None:
    keys.create(path, "alice", "user", None, None)
    with pytest.raises(ConfigError, match="already"):
        keys.create(path, "alice", "admin", None, None)
    with pytest.raises(UnknownName, match="alice"):
        keys.revoke(path, "alise")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": [{}]}', '{"keys": [], "more": 1}', "\ud800"])
def test_a_file_that_is_none_of_keys_is_refused_without_its_content(path: Path, content: str) -> None:
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="keys.json"):
        keys.read(path)


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    keys.create(path, "alice", "user", None, None)
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.read(path)


def test_the_first_key_closes_a_server_that_runs(server: tuple[httpx.Client, Path]) -> None:
    client, path = server
    assert client.get("/v1/models").status_code == client.get("/v1/models", headers=bearer("none")).status_code == 200
    user = keys.create(path, "alice", "user", None, None)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers=bearer(user)).status_code == 200
    path.unlink()
    assert client.get("/v1/models", headers=bearer(user)).status_code == 401, "a file that vanished lets nobody in"


def test_who_gets_in(keyed: tuple[httpx.Client, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "serving")
    client, path = keyed
    user, admin = keys.create(path, "alice", "user", None, None), keys.create(path, "root", "admin", None, None)
    wrong = (
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        {"Authorization": user},
        bearer(user[:-1]),
        {"Authorization": b"Bearer \xff"},
    )
    for sent in wrong:
        for answer in (client.get("/v1/models", headers=sent), client.post("/v1/rag/query", json={}, headers=sent)):
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert user not in answer.text and user[:-1] not in answer.text
    assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers=bearer(user)).status_code == 200
    refused = client.get("/v1/documents", headers=bearer(user))
    assert refused.status_code == 403 and "--role admin" in refused.json()["error"]["message"]
    assert client.get("/v1/documents", headers=bearer(admin)).status_code == 200
    with environment(LLMLAB_ADMIN_KEY="of the environment"):
        assert client.get("/v1/documents", headers=bearer("of the environment")).status_code == 200
    assert all(client.get(path).status_code == 200 for path in ("/healthz", "/readyz", "/docs"))
    for path in ("/metrics", "/metrics/engine"):
        assert client.get(path).status_code not in (401, 403), "Prometheus of this machine"
        assert client.get(path, headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 401, "through a proxy"
    assert client.get("/metrics").status_code == 200
    assert not any(key in client.get("/metrics").text + caplog.text for key in (user, admin))


def test_a_revoked_key_and_a_broken_file_let_nobody_in_without_a_restart(keyed: tuple[httpx.Client, Path]) -> None:
    client, path = keyed
    user = keys.create(path, "alice", "user", None, None)
    assert client.get("/v1/models", headers=bearer(user)).status_code == 200
    good = path.read_bytes()
    keys.revoke(path, "alice")
    assert client.get("/v1/models", headers=bearer(user)).status_code == 401
    path.write_text("{")
    broken = client.get("/v1/models", headers=bearer(user))
    assert broken.status_code == 503 and str(path) not in broken.text
    assert client.get("/healthz").status_code == 200
    path.write_bytes(good)
    assert client.get("/v1/models", headers=bearer(user)).status_code == 200


def test_requests_per_minute(keyed: tuple[httpx.Client, Path]) -> None:
    client, path = keyed
    user = keys.create(path, "alice", "user", 3, None)
    before = metric(client, "llmlab_admission_refused_total", reason="key_requests")
    answers = [client.get("/v1/models", headers=bearer(user)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 10 <= int(answers[-1].headers["Retry-After"]) <= 20
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded") and "alice" in error["message"]
    assert metric(client, "llmlab_admission_refused_total", reason="key_requests") == before + 1


def test_a_bucket_fills_again_by_the_clock(tmp_path: Path, path: Path) -> None:
    keys.create(path, "alice", "user", 60, None)
    (key,), now = keys.read(path), [0.0]
    rates = Rates(tmp_path / "spent.sqlite", clock=lambda: now[0])
    for _ in range(60):
        rates.take_request(key)
    with pytest.raises(RateLimited) as caught:
        rates.take_request(key)
    assert caught.value.retry_after_seconds == 1
    now[0] = 1.0
    rates.take_request(key)
    now[0] = 1000.0
    for _ in range(60):
        rates.take_request(key)
    with pytest.raises(RateLimited):
        rates.take_request(key)


def test_a_budget_outlives_a_restart_and_is_overdrawn_by_one_generation_at_most(tmp_path: Path, path: Path) -> None:
    keys.create(path, "alice", "user", None, 100)
    (key,) = keys.read(path)
    first = Rates(tmp_path / "spent.sqlite")
    give_back = first.reserve(key, 80)
    first.reserve(key, 80)
    with pytest.raises(RateLimited) as caught:
        first.reserve(key, 1)
    assert caught.value.retry_after_seconds == 1, "what runs may end any time"
    give_back()
    first.reserve(key, 1)
    first.spend(key, 100)
    first.close()
    second = Rates(tmp_path / "spent.sqlite")
    with pytest.raises(RateLimited, match="has used 100") as caught:
        second.reserve(key, 1)
    assert 1 <= caught.value.retry_after_seconds <= 86400 and caught.value.kind == "tokens"
    second.close()
    assert stat.S_IMODE((tmp_path / "spent.sqlite").stat().st_mode) == 0o600


@pytest.mark.slow
def test_tokens_are_charged_to_the_key_also_when_a_stream_is_left(tmp_path: Path, path: Path, index_root: Path) -> None:
    user = keys.create(path, "alice", "user", None, 90)
    with (
        environment(LLMLAB_KEYS=str(path), LLMLAB_INDEX=str(index_root), LLMLAB_RUNS=str(tmp_path)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("serving.launch.WORK", tmp_path)
        with running(MODEL, serve_config("keys=keys.json"), adapter="none", say=lambda _: None) as lab:
            check_charges(lab, user)


def check_charges(lab: Running, user: str) -> None:
    (key,), rates = keys.read(lab.service.access.path), lab.service.access.rates
    with httpx.Client(base_url=lab.url, trust_env=False, timeout=60, headers=bearer(user)) as client:
        whole = client.post("/v1/chat/completions", json=CHAT)
        assert whole.status_code == 200, whole.text
        usage = whole.json()["usage"]
        assert rates._spent(key) == usage["total_tokens"]
        embedding = {"model": "minilm", "input": "a text"}
        usage["total_tokens"] += client.post("/v1/embeddings", json=embedding).json()["usage"]["total_tokens"]
        assert rates._spent(key) == usage["total_tokens"]
        with client.stream(
            "POST", "/v1/chat/completions", json=CHAT | {"max_tokens": 900, "stream": True, "ignore_eos": True}
        ) as left:
            lines = left.iter_lines()
            pieces = [next(lines) for _ in range(40)]
        assert sum(line.startswith("data:") for line in pieces) >= 10
    with httpx.Client(base_url=lab.url, trust_env=False, timeout=60, headers=bearer(user)) as client:
        wait_until(lambda: rates._spent(key) >= usage["total_tokens"] + 10, 20)
        wait_until(lambda: not lab.service.admission._running, 20)
        while (answer := client.post("/v1/chat/completions", json=CHAT)).status_code == 200:
            pass
        assert answer.status_code == 429 and answer.json()["error"]["type"] == "tokens"
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.post("/v1/embeddings", json=embedding).status_code == 429
        question = client.post("/v1/rag/query", json={"question": "Who made Vela?"})
        assert question.status_code == 429 and question.json()["error"]["type"] == "RateLimited"


def test_another_address_without_keys_is_refused_with_the_next_command(tmp_path: Path, path: Path) -> None:
    rates = Rates(tmp_path / "spent.sqlite")
    with environment(LLMLAB_ADMIN_KEY=""), pytest.raises(ConfigError, match="llmlab keys create"):
        Access(path, "0.0.0.0", rates)
    with (
        environment(LLMLAB_ADMIN_KEY="", LLMLAB_KEYS=str(path)),
        pytest.raises(ConfigError, match="there is no API key"),
        running(MODEL, serve_config("host=0.0.0.0", "keys=keys.json"), adapter="none", say=lambda _: None),
    ):
        pass
    with environment(LLMLAB_ADMIN_KEY="secret"):
        assert Access(path, "0.0.0.0", rates).closed, "and then everybody needs it"
    keys.create(path, "alice", "user", None, None)
    assert Access(path, "::", rates).closed and not Access(None, "127.0.0.1", rates).closed


def test_the_commands(path: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", *arguments])

    with environment(LLMLAB_KEYS=str(path), COLUMNS="200"):
        made = run("create", "alice", "--role", "admin", "--tokens-per-day", "500")
        key = made.stdout.splitlines()[-1]
        assert made.exit_code == 0 and json.loads(path.read_text())["keys"][0]["sha256"] == keys.digest(key)
        listed = run("list")
        assert listed.exit_code == 0 and key not in listed.output
        wrong = run("revoke", "alise")
        assert wrong.exit_code == 2 and "Traceback" not in wrong.output
        assert run("revoke", "alice").exit_code == 0 and keys.read(path) == ()
