"""Requests that mean harm: each class gets its refusal, in the API's form, and the engine goes on answering."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from serving.launch import Running, running
from tests.serving.conftest import MODEL, environment, serve_config

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
SEEDS = [
    ("/v1/chat/completions", CHAT | {"stop": ["a"], "temperature": 0.5, "logit_bias": {"5": 1}, "seed": 1, "n": 1}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}, "stream": True}),
    ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1, "logprobs": 1}),
    ("/v1/embeddings", {"model": "minilm", "input": ["a"], "encoding_format": "float"}),
]  # fmt: skip
JUNK: list[Any] = [
    None, True, -1, 0, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), "", "x" * 9000, "\ud800", "\x00", "a\r\nb: c",
    "../../etc/passwd", [], [[]], {}, {"": None}, {"a": {"b": {"c": []}}}, [None] * 500, ["a"] * 500, {"$ref": "#"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/"}}},
]  # fmt: skip
OWN = ["lora", "id_slot", "n_predict", "cache_prompt", "grammar", "samplers", "chat_template", "__proto__", "\r\nX: y", "\ud800"]


def in_openais_form(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert response.status_code in statuses, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/json" and "Traceback" not in response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\x", "a\r\nSet-Cookie: a=b", "%0d%0aX: y", "\x00", "x" * 3000, "\u2028"]
)
def test_names_go_nowhere(http: httpx.Client, name: str) -> None:
    """Path traversal, header injection and oversize names, in the body and in the path."""
    response = http.post("/v1/chat/completions", json=CHAT | {"model": name})
    assert in_openais_form(response, 404)["param"] == "model"
    for path in (quote(name, safe=""), quote(quote(name, safe=""), safe="")):
        response = http.get(f"/v1/models/{path}")
        in_openais_form(response, 404)
        assert "set-cookie" not in response.headers and "x" not in response.headers


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/..%2f..%2fmetrics", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "/v1/"])
def test_unknown_paths_below_v1_have_openais_form(http: httpx.Client, path: str) -> None:
    in_openais_form(http.get(path), 404)
    in_openais_form(http.delete("/v1/chat/completions"), 405)


def test_a_header_with_a_line_end_is_no_second_header(lab: Running) -> None:
    address = urlsplit(lab.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            b"GET /v1/models/x HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rSet-Cookie: b=c\r\nConnection: close\r\n\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"set-cookie" not in answer.lower() and answer.split(b" ")[1] in (b"400", b"404")


@pytest.mark.parametrize("levels", [70, 300, 5000])
def test_nested_bodies_are_refused(http: httpx.Client, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    for field in ("metadata", "logit_bias", "prompt_cache_options", "audio", "nothing"):
        body = json.dumps(CHAT)[:-1] + f', "{field}": {deep}}}'
        in_openais_form(http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def mutated(random_: random.Random) -> tuple[str, bytes]:
    """Return a valid request with one to three things wrong, or its bytes damaged."""
    path, body = copy.deepcopy(random_.choice(SEEDS))
    for _ in range(random_.randint(1, 3)):
        match random_.randrange(4):
            case 0:
                body[random_.choice(list(body))] = random_.choice(JUNK)
            case 1:
                body[random_.choice(OWN)] = random_.choice(JUNK)
            case 2 if "messages" in body and isinstance(body["messages"], list) and body["messages"]:
                turn = body["messages"][0]
                if isinstance(turn, dict):
                    turn[random_.choice(["role", "content", "name", "tool_calls", "new"])] = random_.choice(JUNK)
            case _:
                body.pop(random_.choice(list(body)), None) if len(body) > 1 else None
    if path != "/v1/embeddings" and body.get("max_tokens") is None:
        body["max_tokens"] = 1  # or the few that are valid take minutes
    content = json.dumps(body).encode()
    if random_.random() < 0.2:
        damaged = bytearray(content)
        for _ in range(random_.randint(1, 8)):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        content = bytes(damaged)
    return path, content


def fuzz(http: httpx.Client, seed: int, count: int) -> dict[int, int]:
    random_, statuses = random.Random(seed), {}  # noqa: S311
    for _ in range(count):
        path, content = mutated(random_)
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            in_openais_form(response, 400, 404, 413)
    return statuses


def test_fuzzed_requests_are_refused(http: httpx.Client) -> None:
    statuses = fuzz(http, seed=7, count=60)
    assert statuses[400] > 30
    assert http.get("/readyz").status_code == 200


@pytest.mark.slow
def test_a_thousand_fuzzed_requests(lab: Running, http: httpx.Client) -> None:
    restarts = lab.service.supervisor.status
    statuses = fuzz(http, seed=11, count=1000)
    assert sum(statuses.values()) == 1000 and statuses[400] > 600
    assert lab.service.supervisor.status == restarts and http.get("/readyz").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="schemathesis is not installed: make setup-dev")
def test_what_the_openapi_document_allows_never_breaks_the_server(index_root: Path, tmp_path: Path) -> None:
    """Schemathesis makes requests from the document, right and wrong ones, and checks status, type and form of each answer."""
    with environment(LLMLAB_INDEX=str(index_root), LLMLAB_RUNS=str(tmp_path / "none")):
        config = serve_config("default_max_tokens=1", "max_tokens=2", "requests.max_choices=1")
        with running(MODEL, config, say=lambda _: None) as served:
            document = httpx.get(f"{served.url}/openapi.json", trust_env=False).json()
            for name, model in {"ChatRequest": MODEL, "CompletionRequest": MODEL, "EmbeddingRequest": "minilm"}.items():
                document["components"]["schemas"][name]["properties"]["model"]["enum"] = [model]  # or nearly all are a 404
            (tmp_path / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
            checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
            command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", served.url, "--checks", checks,
                       "--phases", "fuzzing", "--max-examples", "12", "--seed", "3", "--no-shrink", "--continue-on-failure",
                       "--suppress-health-check", "all"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=400)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            assert re.search(r"Selected: (\d+)/\1\s+Tested: \1\b", done.stdout), done.stdout[-3000:]
            assert httpx.get(f"{served.url}/readyz", trust_env=False).status_code == 200
