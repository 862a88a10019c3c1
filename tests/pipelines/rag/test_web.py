"""Web pages: what is refused, that the checked address is the one that is asked, and that a sync then reads them."""

from __future__ import annotations

import datetime
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines.errors import ConfigError, DataError
from pipelines.rag import web
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.load import load
from pipelines.rag.web import Page, fetch, is_public

HTML = "<html><head><title>Geysers</title></head><body><h1>Geysers</h1><p>Strokkur erupts every ten minutes.</p></body></html>"


class Site:
    """A real server on loopback: answers by path, and the Host headers that it got."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.hosts: list[str] = []
        self.endless = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.hosts.append(self.headers["Host"])
                status, headers, body = site.answers.get(self.path, (404, {}, b"none"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if self.path == "/slow":
                    self.end_headers()
                    while not site.endless.wait(0.05):
                        self.wfile.write(b"x")
                    return
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def has(self, path: str, body: str | bytes, kind: str = "text/html; charset=utf-8", status: int = 200, **more: str) -> None:
        headers = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in more.items()}}
        self.answers[path] = status, headers, body.encode() if isinstance(body, str) else body

    def url(self, path: str, host: str = "pages.test") -> str:
        return f"http://{host}:{self.port}{path}"

    def close(self) -> None:
        self.endless.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def get(site: Site, tmp_path: Path) -> Callable[..., Page]:
    """Return `fetch` for two names that are both at loopback."""
    hosts = [f"{name}:{site.port}" for name in ("pages.test", "other.test")]
    return partial(
        fetch,
        into=tmp_path / "web",
        hosts=hosts,
        resolve=lambda *_: ["127.0.0.1"],
        is_allowed_address=lambda address: address == "127.0.0.1",
    )


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.0.0.1", "192.88.99.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "2002:7f00:1::", "2002:808:808::", "2001:0:1::1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2606:4700::1%1", "3fff::1", "5f00::1"),
        *("localhost", "", "127.1", "2130706433", "0x7f.1"),
    ],
)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::6810:84e5", "2a00:1450:4001::1", "64:ff9b::808:808"])
def test_what_is_public_is_allowed(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "2130706433", "127.1", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_by_whatever_name(site: Site, tmp_path: Path, name: str) -> None:
    """The real look-up and the real check; the server would answer."""
    site.has("/", HTML)
    with pytest.raises((ConfigError, DataError), match="not a public address|cannot be looked up"):
        fetch(site.url("/", name), tmp_path / "web", [f"{name.strip('[]')}:{site.port}"])
    assert not site.hosts and not (tmp_path / "web").exists()


def test_one_private_address_among_public_ones_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pages\.test is at 10\.0\.0\.1"):
        fetch("https://pages.test/", tmp_path, ["pages.test"], resolve=lambda *_: ["8.8.8.8", "10.0.0.1"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://pages.test/a", "not an address of a web page"),
        ("file:///etc/passwd", "not an address of a web page"),
        ("pages.test/a", "not an address of a web page"),
        ("http:///a", "not an address"),
        ("http://pages.test\n/", "not an address"),
        ("http://pages.test:99999/", "not an address|not a host"),
        ("http://user:hunter2@pages.test/", "holds a user name or a password"),
        ("http://evil.test/", r"evil\.test is not a host that may be asked(.|\n)*one of pages\.test"),
        ("http://pages.test:22/", "pages.test:22 is not a host"),
        ("http://pages.test.evil.test/", "is not a host"),
        ("http://pages.test@evil.test/", "user name"),
        ("http://evil.test\\@pages.test/", "not a host|user name|not an address"),
    ],
)
def test_an_address_that_may_not_be_asked_is_refused_before_it_is_looked_up(tmp_path: Path, url: str, message: str) -> None:
    def resolve(host: str, _: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    with pytest.raises(ConfigError, match=message) as raised:
        fetch(url, tmp_path, ["pages.test"], resolve=resolve)
    assert "hunter2" not in str(raised.value)


def test_a_page_is_kept_with_where_it_is_from(site: Site, get: Callable[..., Page]) -> None:
    site.has("/nature/Geysers?page=1", HTML)
    page = get(site.url("/nature/Geysers?page=1#top"))
    assert page.path.read_text() == HTML and page.size == len(HTML)
    assert page.path.name.startswith(f"pages.test-{site.port}-nature-geysers-page-1-") and page.path.suffix == ".html"
    record = json.loads((page.path.parent / ".fetched.json").read_text())[page.path.name]
    assert record["url"] == site.url("/nature/Geysers?page=1#top") and record["fetched"].endswith("Z")
    assert site.hosts == [f"pages.test:{site.port}"]
    site.has("/nature/Geysers?page=1", "Plain now.", "text/plain")
    again = get(site.url("/nature/Geysers?page=1#top"))
    assert again.path.suffix == ".txt" and not page.path.exists()
    assert sorted(path.name for path in page.path.parent.iterdir()) == [".fetched.json", again.path.name]


def test_the_type_and_the_character_set_decide_what_is_written(site: Site, get: Callable[..., Page]) -> None:
    site.has("/latin", "Café".encode("latin-1"), "text/plain; charset=ISO-8859-1")
    site.has("/meta", '<meta charset="windows-1251"><p>Привет</p>'.encode("cp1251"), "text/html")
    site.has("/bare", "naïve".encode("cp1252"), "text/plain")
    site.has("/odd", "naïve", "text/plain; charset=punycode")
    site.has("/md", "# One\n\ntwo", "text/markdown")
    site.has("/pdf", b"%PDF-1.4 \xff\x00", "application/pdf")
    assert get(site.url("/latin")).path.read_text() == "Café"
    assert "Привет" in get(site.url("/meta")).path.read_text()
    assert get(site.url("/bare")).path.read_text() == get(site.url("/odd")).path.read_text() == "naïve"
    assert get(site.url("/md")).path.suffix == ".md"
    assert get(site.url("/pdf")).path.read_bytes() == b"%PDF-1.4 \xff\x00"


def test_redirects_are_followed_only_to_where_they_may_lead(site: Site, get: Callable[..., Page]) -> None:
    site.has("/page", HTML)
    site.has("/a", "", status=302, Location="/b")
    site.has("/b", "", status=301, Location=site.url("/page", "other.test"))
    page = get(site.url("/a"))
    assert page.url == site.url("/page", "other.test")
    assert site.hosts == [f"pages.test:{site.port}"] * 2 + [f"other.test:{site.port}"]
    for location, message in (
        (f"http://127.0.0.1:{site.port}/page", "is not a host that may be asked"),
        ("http://metadata.test/", "is not a host that may be asked"),
        ("file:///etc/passwd", "not an address of a web page"),
        (f"http://u:p@pages.test:{site.port}/page", "user name or a password"),
    ):
        site.has("/away", "", status=302, Location=location)
        with pytest.raises(ConfigError, match=message):
            get(site.url("/away"))
    site.has("/loop", "", status=302, Location="/loop")
    with pytest.raises(DataError, match="leads on more than 5 times"):
        get(site.url("/loop"))


def test_a_name_that_moves_to_a_private_address_gains_nothing(site: Site, tmp_path: Path) -> None:
    """The name is looked up once for each request, and that answer is both checked and used."""
    site.has("/a", "", status=302, Location="/b")
    site.has("/b", HTML)
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    with pytest.raises(ConfigError, match=r"is at 127\.0\.0\.2"):
        fetch(
            site.url("/a"), tmp_path, [f"pages.test:{site.port}"], resolve=lambda *_: next(answers),
            is_allowed_address=lambda address: address == "127.0.0.1",
        )  # fmt: skip
    assert len(site.hosts) == 1 and next(answers, None) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": "x", "status": 404}, "answers with status 404"),
        ({"body": "x", "status": 304}, "answers with status 304"),
        ({"body": "x", "kind": "image/png"}, "is of type image/png"),
        ({"body": "x", "kind": ""}, r"is of type \(none\)"),
        ({"body": ""}, "is empty"),
        ({"body": b"x" * (web.MAX_BYTES + 1)}, "has more than 10000000 bytes"),
        ({"body": b"\x1f\x8b", "Content_Encoding": "gzip"}, "comes as gzip"),
    ],
)
def test_what_is_not_a_page_is_not_kept(site: Site, get: Callable[..., Page], answer: dict[str, Any], message: str) -> None:
    site.has("/x", **answer)
    with pytest.raises(DataError, match=message):
        get(site.url("/x"))


def test_a_page_that_never_ends_is_given_up(site: Site, get: Callable[..., Page], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_SECONDS", 0.5)
    site.has("/slow", "")
    with pytest.raises(DataError, match="took more than"):
        get(site.url("/slow"))


def test_a_server_that_is_not_there_or_not_known_is_told(site: Site, get: Callable[..., Page], tmp_path: Path) -> None:
    url = site.url("/")
    site.close()
    with pytest.raises(DataError, match="ConnectError"):
        get(url)
    with pytest.raises(DataError, match="cannot be looked up"):
        fetch("https://name.invalid/", tmp_path, ["name.invalid"])


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a self-signed certificate of a host, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(named).issuer_name(named).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(secret)
    return folder / "cert.pem", folder / "key.pem"


def test_the_certificate_must_be_that_of_the_name_though_an_address_is_connected_to(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "pages.test")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    asked: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked.append(name)
    site = Site(server)
    site.has("/", HTML)
    trusted = ssl.create_default_context(cafile=str(cert))
    hosts = [f"{name}:{site.port}" for name in ("pages.test", "other.test")]
    allowed: dict[str, Any] = {"resolve": lambda *_: ["127.0.0.1"], "is_allowed_address": lambda a: a == "127.0.0.1"}
    try:
        page = fetch(f"https://pages.test:{site.port}/", tmp_path / "web", hosts, tls=trusted, **allowed)
        assert page.path.read_text() == HTML and asked == ["pages.test"]
        assert site.hosts == [f"pages.test:{site.port}"]
        with pytest.raises(DataError, match="(?i)certificate verify failed"):
            fetch(f"https://other.test:{site.port}/", tmp_path / "web", hosts, tls=trusted, **allowed)
        with pytest.raises(DataError, match="(?i)certificate verify failed"):
            fetch(f"https://pages.test:{site.port}/", tmp_path / "web", hosts, **allowed)
        site.has("/down", "", status=302, Location=f"http://pages.test:{site.port}/")
        with pytest.raises(ConfigError, match="not encrypted"):
            fetch(f"https://pages.test:{site.port}/down", tmp_path / "web", hosts, tls=trusted, **allowed)
    finally:
        site.close()


def test_a_sync_reads_what_was_fetched(
    site: Site, get: Callable[..., Page], tmp_path: Path, config: RagConfig, hash_embedder: Any
) -> None:
    site.has("/geysers", HTML)
    page = get(site.url("/geysers"))
    assert [d.source for d in load(tmp_path / "web")[0]] == [page.path.name]
    sync(tmp_path / "web", "lab", config, hash_embedder)
    (found,) = open_index("lab", hash_embedder).chunks
    assert (found.kind, found.title, found.text) == ("html", "Geysers", "Strokkur erupts every ten minutes.")
