"""/v1/documents through the real gateway: what is uploaded is found, what is removed is gone, and what is refused says why."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.config import load, named
from pipelines.rag import generation, uploads
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, sync
from serving import documents, launch
from serving.launch import running
from tests.serving.conftest import (
    MODEL,
    PAGES,
    FakeEngine,
    environment,
    fake_service,
    metric,
    serve_config,
    server_sent_events,
    wait_until,
)

KEY = "a key of the tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
SMALL = ["max_document_bytes=300000", "max_documents=6"]
BARSOOM = b"# Barsoom\n\nBarsoom is a planet with 2 moons, which Dejah Thoris counts each night.\n"
QUESTION = "How many moons has Barsoom?"


@contextmanager
def gateway(root: Path, *overrides: str) -> Iterator[httpx.Client]:
    """Serve a fake engine and the index below `root`, with a key, for as long as the block."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(launch.engines, "named", lambda _: FakeEngine("well"))
        patch.setattr(launch, "WORK", root / "work")
        stack.enter_context(environment(LLMLAB_INDEX=str(root / "index"), LLMLAB_RUNS=str(root), LLMLAB_ADMIN_KEY=KEY))
        served = stack.enter_context(running(MODEL, serve_config(*SMALL, *overrides), say=lambda _: None))
        yield stack.enter_context(httpx.Client(base_url=served.url, trust_env=False, timeout=60, headers=ADMIN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents that a user has indexed."""
    root = tmp_path_factory.mktemp("documents")
    (root / "notes").mkdir()
    for name, text in PAGES.items():
        (root / "notes" / name).write_text(text, encoding="utf-8")
    with environment(LLMLAB_INDEX=str(root / "index")):
        sync_of(root / "notes")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with gateway(folder) as http:
        yield http


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "client" in request.fixturenames:
        http = request.getfixturevalue("client")
        for card in listing(http)["data"]:
            http.delete(f"/v1/documents/{card['path']}")
        settled(http)


def sync_of(docs: Path) -> None:
    config = load(named("rag", "default"), RagConfig)
    sync(docs, "knowledge", config, load_embedder(config.embedder))


def listing(http: httpx.Client) -> Any:
    return http.get("/v1/documents").raise_for_status().json()


def settled(http: httpx.Client) -> Any:
    return wait_until(lambda: (now := listing(http)) and not now["index"]["syncing"] and now)


def send(http: httpx.Client, name: str, content: bytes = BARSOOM, **form: str) -> httpx.Response:
    return http.post("/v1/documents", files={"file": (name, content)}, data=form)


def passages(http: httpx.Client, question: str = QUESTION) -> list[dict[str, Any]]:
    response = http.post("/v1/rag/query", json={"question": question, "k": 5, "stream": True})
    return list(server_sent_events(response)[0][1]["passages"]) if response.status_code == 200 else []


def test_an_upload_is_found_replaced_and_removed(client: httpx.Client, folder: Path) -> None:
    before = sorted(p.name for p in (folder / "notes").iterdir())
    sent = send(client, "b.md", path="planets/barsoom.md")
    assert sent.status_code == 202 and sent.json()["path"] == "planets/barsoom.md" and sent.json()["next"]
    card = settled(client)["data"][0]
    assert card["status"] == "indexed" and card["chunks"] == 1 and card["bytes"] == len(BARSOOM)
    found = passages(client)
    assert found[0]["source"] == card["source"] == "uploaded:planets/barsoom.md" and "2 moons" in found[0]["text"]
    assert {p["source"] for p in passages(client, "Who made Vela?")} >= set(PAGES)  # the folder's are still there

    assert send(client, "planets/barsoom.md", BARSOOM.replace(b"2 moons", b"7 moons"), path="planets/barsoom.md").is_success
    assert settled(client)["data"][0]["sha256"] != card["sha256"]
    assert "7 moons" in passages(client)[0]["text"] and "2 moons" not in str(passages(client))

    gone = client.delete("/v1/documents/planets/barsoom.md")
    assert gone.status_code == 202 and gone.json()["status"] == "deleting"
    now = settled(client)
    assert now["data"] == [] and now["index"]["documents"] == len(PAGES) and "Barsoom" not in str(passages(client))
    assert client.delete("/v1/documents/planets/barsoom.md").status_code == 404
    assert sorted(p.name for p in (folder / "notes").iterdir()) == before
    assert list((folder / "index" / "knowledge.documents").iterdir()) == []


def test_a_sync_of_the_folder_keeps_what_was_uploaded(client: httpx.Client, folder: Path) -> None:
    send(client, "barsoom.md")
    settled(client)
    (folder / "notes" / "new.md").write_text("# Amtor\n\nAmtor has no moon.\n", encoding="utf-8")
    sync_of(folder / "notes")
    wait_until(lambda: {"new.md", "uploaded:barsoom.md"} <= {p["source"] for p in passages(client)})
    client.delete("/v1/documents/barsoom.md")
    settled(client)
    assert "new.md" in {p["source"] for p in passages(client)} and "Barsoom" not in str(passages(client))


def test_uploads_at_once_are_all_indexed(client: httpx.Client) -> None:
    started: list[str] = []
    original = documents.Knowledge.sync
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(5) as pool:
        patch.setattr(documents.Knowledge, "sync", lambda self, docs: (started.append("sync"), original(self, docs))[1])
        answers = list(pool.map(lambda n: send(client, f"{n}.md", BARSOOM + str(n).encode()), range(5)))
        assert [a.status_code for a in answers] == [202] * 5
        now = settled(client)
    assert [card["status"] for card in now["data"]] == ["indexed"] * 5 and 1 <= len(started) <= 5


def test_the_same_name_at_once_is_one_of_the_two(client: httpx.Client) -> None:
    contents = [BARSOOM * n for n in (1, 40)]
    with ThreadPoolExecutor(2) as pool:
        assert all(a.status_code == 202 for a in pool.map(lambda c: send(client, "same.md", c), contents * 3))
    (card,) = settled(client)["data"]
    assert card["bytes"] in map(len, contents) and card["status"] == "indexed"


BAD_NAMES = [
    "../a.md", "a/../../b.md", "/etc/a.md", "./a.md", "a//b.md", "a/./b.md", ".hidden.md", "a/.git/b.md", "..\\a.md", "C:\\a.md",
    "C:a.md", "a\x00.md", "a\n.md", "a\x7f.md", "a\u202egnp.md", "a\u200b.md", "con.md", "NUL", "aux.tar.md", "COM1.md",
    "lpt9.md", "COM¹.md", "a /b.md", "a./b.md", "a.md.", "a.md ", " a.md", "a/", "x" * 250 + ".md", "d/" * 12 + "a.md",
    "/".join(["ä" * 90] * 6) + ".md", "a?.md", "a*.md", "a|b.md", "<a>.md", '"a".md', "uploaded:a.md", "conin$.md",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_is_refused(client: httpx.Client, folder: Path, name: str) -> None:
    before = sorted(p for p in folder.rglob("*") if "work" not in p.parts)
    response = send(client, "a.md", path=name)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and "the name" in error["message"]
    assert sorted(p for p in folder.rglob("*") if "work" not in p.parts) == before


@pytest.mark.parametrize("name", [n for n in BAD_NAMES if n != "NUL"], ids=ascii)
def test_nor_can_it_be_removed(client: httpx.Client, name: str) -> None:
    from urllib.parse import quote

    assert client.delete("/v1/documents/" + quote(name, safe="")).status_code in (404, 422)


@pytest.mark.parametrize("name", ["a b.md", "ä/é.md", "東京.md", "a-b_c(1)+%.md", "x" * 190 + ".md", "console.md", "a..b.md"])
def test_other_names_are_kept(client: httpx.Client, name: str) -> None:
    from urllib.parse import quote

    assert send(client, "a.md", path=name).status_code == 202
    settled(client)
    assert client.get("/v1/documents/" + quote(name)).json()["status"] == "indexed"
    assert client.delete("/v1/documents/" + quote(name)).status_code == 202


def test_a_name_in_another_normal_form_is_the_same_document(client: httpx.Client) -> None:
    send(client, "a.md", path="e\u0301.md")
    send(client, "a.md", path="\u00e9.md")
    assert [card["path"] for card in settled(client)["data"]] == ["\u00e9.md"]


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("a.exe", b"MZ", 415, "not supported"),
        ("a", b"text", 415, "not supported"),
        ("a.md", b"", 422, "0 bytes"),
        ("a.md", b"  \n", 422, "no text"),
        ("a.txt", b"\xff\xfe\x00", 422, "not UTF-8"),
        ("a.pdf", b"%PDF-1.7 broken", 422, "cannot be read"),
        ("a.md", b"x" * 300001, 413, "300001 bytes"),
        ("a.md", b"x" * 400000, 413, "bytes"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(
    client: httpx.Client, folder: Path, name: str, content: bytes, status: int, words: str
) -> None:
    response = send(client, name, content)
    assert response.status_code == status and words in response.json()["error"]["message"], response.text
    assert "Traceback" not in response.text and "/tmp" not in response.text
    assert settled(client)["data"] == [] and list((folder / "index" / "knowledge.documents").rglob("*")) == []


def test_a_form_without_a_file_is_refused(client: httpx.Client) -> None:
    response = client.post("/v1/documents", data={"path": "a.md"})
    assert response.status_code == 422 and "file" in response.json()["error"]["message"]
    assert client.post("/v1/documents", content=b"text").status_code == 422


def test_there_are_only_so_many(client: httpx.Client) -> None:
    for n in range(6):
        assert send(client, f"{n}.md").status_code == 202
    full = send(client, "6.md")
    assert full.status_code == 409 and "at most 6" in full.json()["error"]["message"]
    assert send(client, "5.md", BARSOOM * 2).status_code == 202  # one in place of another is no more


def test_a_document_and_a_folder_cannot_share_a_name(client: httpx.Client) -> None:
    assert send(client, "a.md").status_code == 202
    below = send(client, "b.md", path="a.md/b.md")
    assert below.status_code == 409 and "a.md is a file or a link" in below.json()["error"]["message"]
    assert send(client, "b.md", path="d.md/b.md").status_code == 202
    assert send(client, "d.md").status_code == 409


def test_a_link_is_neither_followed_nor_listed(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    root = folder / "index" / "knowledge.documents"
    root.mkdir(exist_ok=True)
    (tmp_path / "secret.md").write_text("# Secret\n\nThe secret is 42.\n", encoding="utf-8")
    (root / "out").symlink_to(tmp_path)
    (root / "one.md").symlink_to(tmp_path / "secret.md")
    try:
        assert send(client, "a.md", path="out/a.md").status_code == 409 and send(client, "one.md").status_code == 409
        assert client.delete("/v1/documents/out/secret.md").status_code == 404
        assert client.delete("/v1/documents/one.md").status_code == 404
        send(client, "barsoom.md")
        assert [card["path"] for card in settled(client)["data"]] == ["barsoom.md"]
        assert "The secret is" not in str(passages(client, "What is the secret?"))
    finally:
        (root / "out").unlink()
        (root / "one.md").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["secret.md"]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({}, "no admin key"),
        ({"Authorization": "Bearer wrong"}, "not the right one"),
        ({"Authorization": f"Basic {KEY}"}, "not the right one"),
        ({"Authorization": "Bearer"}, "not the right one"),
        ({"Authorization": b"Bearer \xff\xe4"}, "not the right one"),
    ],
)
def test_a_wrong_key_is_refused_before_the_body_is_read(client: httpx.Client, sent: dict[str, Any], words: str) -> None:
    with httpx.Client(base_url=client.base_url, trust_env=False, timeout=20, headers=sent) as other:
        answers = [send(other, "a.md"), other.get("/v1/documents"), other.get("/v1/documents/a.md")]
        answers += [other.delete("/v1/documents/a.md"), send(other, "a.md", b"x" * 200)]
        for answer in answers:
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert words in answer.json()["error"]["message"] and KEY not in answer.text
    assert listing(client)["data"] == []


def test_without_a_key_of_the_server_nothing_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMLAB_ADMIN_KEY", raising=False)
    with fake_service(tmp_path) as http:
        for answer in (send(http, "a.md"), http.get("/v1/documents", headers=ADMIN), http.delete("/v1/documents/a.md")):
            assert answer.status_code == 403 and "LLMLAB_ADMIN_KEY" in answer.json()["error"]["message"]
        monkeypatch.setenv("LLMLAB_ADMIN_KEY", "")
        assert http.get("/v1/documents", headers={"Authorization": "Bearer"}).status_code == 403


def test_other_bodies_keep_their_limit(client: httpx.Client) -> None:
    for path in ("/v1/rag/query", "/v1/documents/", "/v1/documents/a.md"):
        assert client.post(path, content=b"x" * 270_000).status_code == 413


def test_a_full_disk_is_explained_and_changes_nothing(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(client, "a.md")
    settled(client)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(uploads.os, "fsync", full)
    response = send(client, "a.md", BARSOOM * 2)
    monkeypatch.undo()
    assert response.status_code == 507 and "no space left" in response.json()["error"]["message"]
    root = folder / "index" / "knowledge.documents"
    assert [p.name for p in root.rglob("*")] == ["a.md"] and (root / "a.md").read_bytes() == BARSOOM


def test_a_sync_that_fails_is_told_and_the_next_one_makes_up_for_it(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(documents.Knowledge, "sync", broken)
    send(client, "a.md")
    now = settled(client)
    assert now["data"][0]["status"] == "pending" and "unexpected error" in now["index"]["problem"]["message"]
    assert "secret" not in str(now) and "secret detail" in caplog.text and KEY not in caplog.text
    monkeypatch.undo()
    send(client, "b.md")
    now = settled(client)
    assert [card["status"] for card in now["data"]] == ["indexed"] * 2 and now["index"]["problem"] is None


def test_an_index_that_another_process_builds_is_waited_for(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BUSY_SECONDS", 0.1)
    with generation.only_writer(generation.folder_of("knowledge")):
        send(client, "a.md")
        now = wait_until(lambda: (now := listing(client))["index"]["problem"] and now)
        assert "another process builds" in now["index"]["problem"]["message"] and now["data"][0]["status"] == "pending"
    assert settled(client)["data"][0]["status"] == "indexed"


def test_without_any_index_the_first_upload_makes_one_and_the_last_removal_ends_it(tmp_path: Path) -> None:
    with gateway(tmp_path) as http:
        assert http.post("/v1/rag/query", json={"question": QUESTION}).status_code == 503
        assert send(http, "barsoom.md").status_code == 202
        settled(http)
        assert "2 moons" in passages(http)[0]["text"]
        http.delete("/v1/documents/barsoom.md")
        assert settled(http)["index"]["generation"] is None
        answer = http.post("/v1/rag/query", json={"question": QUESTION})
        assert answer.status_code == 503 and "2 moons" not in answer.text
        assert not any(p.is_dir() for p in (tmp_path / "index" / "knowledge").iterdir())


def test_what_a_stop_interrupted_is_done_at_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "index" / "knowledge.documents"
    (root / ".incoming-x").mkdir(parents=True)
    (root / "barsoom.md").write_bytes(BARSOOM)
    with gateway(tmp_path) as http:
        assert settled(http)["data"][0]["status"] == "indexed" and not (root / ".incoming-x").exists()
        assert metric(http, "llmlab_http_requests_total", route="/v1/documents", status="200") >= 1


def test_a_folder_that_was_named_is_the_one_that_changes(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "vela.md").write_text(PAGES["vela.md"], encoding="utf-8")
    with environment(LLMLAB_INDEX=str(tmp_path / "index")):
        sync_of(notes)
    with gateway(tmp_path, f"documents={notes}") as http:
        assert [(c["path"], c["status"]) for c in listing(http)["data"]] == [("vela.md", "indexed")]
        assert send(http, "barsoom.md").json()["source"] == "barsoom.md"
        settled(http)
        assert passages(http)[0]["source"] == "barsoom.md" and (notes / "barsoom.md").read_bytes() == BARSOOM
        http.delete("/v1/documents/vela.md")
        settled(http)
        assert not (notes / "vela.md").exists() and "Orion" not in str(passages(http, "Who made Vela?"))


def test_a_folder_that_the_index_does_not_say_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "vela.md").write_text(PAGES["vela.md"], encoding="utf-8")
    with environment(LLMLAB_INDEX=str(tmp_path / "index")):
        sync_of(tmp_path / "notes")
    with gateway(tmp_path, f"documents={tmp_path / 'other'}") as http:
        refused = send(http, "barsoom.md")
        assert refused.status_code == 409 and "'notes'" in refused.json()["error"]["message"]
        assert not (tmp_path / "other").exists() and passages(http, "Who made Vela?")


def test_questions_go_on_while_documents_change(client: httpx.Client) -> None:
    failed: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            failed.extend([] if passages(client, "Who made Vela?") else [1])

    asker = threading.Thread(target=ask)
    asker.start()
    for n in range(3):
        send(client, "barsoom.md", BARSOOM + str(n).encode())
        settled(client)
    done.set()
    asker.join()
    assert failed == []
