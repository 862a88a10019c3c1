"""What strangers do to a port: slow heads and bodies, half-closed sockets, too many connections; CORS; and TLS files."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pipelines.errors import ConfigError
from serving.server import LONGEST_HEAD_BYTES
from serving.settings import load_serve_config
from serving.tls import context
from tests.serving.conftest import MODEL, fake_service, metric, wait_until

ORIGIN = "https://app.example"
BOUNDS = (
    "connections.header_seconds=0.4", "connections.body_seconds=0.4", "connections.body_bytes_per_second=100",
    "connections.limit=6", f'cors_origins=["{ORIGIN}"]',
)  # fmt: skip
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hang"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with fake_service(tmp_path_factory.mktemp("strict"), *BOUNDS) as client:
        yield client


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=5)


def rest(connection: socket.socket) -> bytes:
    """Return what still comes until the server closes."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.mark.parametrize("start", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b"])
def test_a_head_that_does_not_come_ends_the_connection(strict: httpx.Client, start: bytes) -> None:
    with connect(strict) as connection:
        began = time.monotonic()
        connection.sendall(start)
        assert rest(connection) == b"" and 0.3 < time.monotonic() - began < 3


def test_a_head_that_trickles_after_an_answer_ends_the_connection_too(strict: httpx.Client) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET")
        assert b"HTTP/1.1" not in rest(connection)


def test_a_head_without_an_end_is_refused_for_its_length(strict: httpx.Client) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: ")
        time.sleep(0.05)
        connection.sendall(b"a" * (LONGEST_HEAD_BYTES + 1))
        reply = rest(connection)
    assert reply.startswith(b"HTTP/1.1 400 ") and f"at most {LONGEST_HEAD_BYTES} bytes".encode() in reply
    assert strict.get("/healthz", headers={"X-Long": "a" * (LONGEST_HEAD_BYTES // 2)}).status_code == 200


def test_a_body_that_trickles_is_answered_408(strict: httpx.Client) -> None:
    with connect(strict) as connection:
        connection.sendall(HEAD % 5000)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 3:
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - began < 2.5, "each byte prolongs it by little"
    with connect(strict) as connection:
        connection.sendall(HEAD % 5000)
        answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer and b"connection: close" in answer.lower()


def test_a_socket_closed_on_one_side_ends_what_it_asked_for(strict: httpx.Client) -> None:
    with connect(strict) as connection:
        connection.sendall(HEAD % len(CHAT) + CHAT)
        wait_until(lambda: metric(strict, "llmlab_admission_running") == 1, 5)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""
        wait_until(lambda: metric(strict, "llmlab_admission_running") == 0, 5)


def test_connections_beyond_the_limit_are_told_so(strict: httpx.Client) -> None:
    strict.get("/healthz")
    taken = [connect(strict) for _ in range(5)]
    with connect(strict) as another:
        answer = rest(another)
    assert answer.startswith(b"HTTP/1.1 429") and b"Retry-After: 1" in answer and b"server_overloaded" in answer
    for connection in taken:
        connection.close()
    wait_until(lambda: strict.get("/healthz").status_code == 200, 5)
    assert metric(strict, "llmlab_admission_refused_total", reason="connections") >= 1


def test_a_page_of_a_named_origin_may_ask_and_others_may_not(strict: httpx.Client) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = strict.options("/v1/chat/completions", headers=ask | {"Origin": ORIGIN})
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    assert strict.get("/nowhere", headers={"Origin": ORIGIN}).headers["Access-Control-Allow-Origin"] == ORIGIN
    other = strict.options("/v1/chat/completions", headers=ask | {"Origin": "https://other.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_no_origin_is_allowed_by_default(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Origin": ORIGIN})
    assert not any(name.startswith("access-control") for name in answer.headers)
    for wrong in ("*", "app.example", "https://app.example/", "https://a b"):
        with pytest.raises(ConfigError, match="cors_origins"):
            load_serve_config("default", [f'cors_origins=["{wrong}"]'])


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, its key, the key encrypted, and another key."""
    folder = tmp_path_factory.mktemp("pems")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    try:
        for name in ("own", "other"):
            files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
            subprocess.run([*make, *files], cwd=folder, check=True, capture_output=True)
        lock = ["openssl", "pkey", "-in", "own.key", "-aes256", "-passout", "pass:x", "-out", "locked.key"]
        subprocess.run(lock, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("none.pem", "own.key", "certificate .*none.pem cannot be read"),
        ("own.pem", "none.key", "private key .*none.key cannot be read"),
        ("own.pem", "other.key", "do not belong together"),
        ("own.pem", "locked.key", "is encrypted"),
        ("own.pem", "own.pem", "cannot be used"),
        ("text", "own.key", "is not a PEM file"),
    ],
)
def test_files_that_cannot_be_served_with(pems: Path, certificate: str, key: str, words: str) -> None:
    (pems / "text").write_text("hello")
    with pytest.raises(ConfigError, match=words):
        context(pems / certificate, pems / key)


def test_tls_needs_both_files() -> None:
    with pytest.raises(ConfigError, match="both tls_cert and tls_key"):
        load_serve_config("default", ["tls_cert=a.pem"])


@pytest.mark.slow
def test_it_speaks_https(pems: Path, tmp_path: Path) -> None:
    import ssl

    with fake_service(tmp_path, f"tls_cert={pems / 'own.pem'}", f"tls_key={pems / 'own.key'}") as client:
        assert client.base_url.scheme == "https"
        with httpx.Client(verify=ssl.create_default_context(cafile=pems / "own.pem"), trust_env=False) as trusting:
            assert trusting.get(f"{client.base_url}/healthz").json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="self-signed"):
            client.get("/healthz")
