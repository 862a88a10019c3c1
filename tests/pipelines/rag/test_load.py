"""Loading: titles, heading paths and pages of each format, and files that cannot be read."""

from __future__ import annotations

import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from pypdf import PdfReader, PdfWriter
from reportlab.pdfgen.canvas import Canvas

from pipelines.errors import DataError
from pipelines.rag.load import document_files, load
from tests.pipelines.rag.conftest import read_one, sections


def pdf(*pages: str, title: str = "") -> bytes:
    buffer = io.BytesIO()
    canvas = Canvas(buffer)
    canvas.setTitle(title)
    for page in pages:
        canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def encrypted(content: bytes, user: str) -> bytes:
    writer, buffer = PdfWriter(PdfReader(io.BytesIO(content))), io.BytesIO()
    writer.encrypt(user, "owner", algorithm="AES-256")
    writer.write(buffer)
    return buffer.getvalue()


def test_documents_come_in_order_with_their_paths(docs: Path) -> None:
    documents, skipped = load(docs)
    assert [d.source for d in documents] == ["cache.txt", "claude-2.md", "deep/monitor.html", "falcon.md"]
    assert [d.title for d in documents] == ["cache", "Claude 2", "Prometheus", "Falcon 40B"]
    assert not skipped


def test_a_file_that_is_known_is_not_parsed_again(docs: Path) -> None:
    known = {d.source: d.sha256 for d in load(docs)[0]}
    (docs / "falcon.md").write_text("# Falcon 180B\n\nLarger.\n")
    documents, _ = load(docs, known)
    assert [d.source for d in documents if d.sections] == ["falcon.md"]
    assert {d.source: d.sha256 for d in documents if not d.sections} == {s: h for s, h in known.items() if s != "falcon.md"}


def test_markdown_headings_become_paths(tmp_path: Path) -> None:
    text = (
        "Before.\n# Guide to `vllm`\n## Setup <a id='x'></a>\n```sh\n# not a heading\n```\n"
        "### Deep\\_er\ntext\n\nSecond\n------\nmore\n## Empty leaf\n"
    )
    document = read_one(tmp_path, "guide.md", text)
    assert document.title == "Guide to vllm"
    assert sections(document) == [
        ("Guide to vllm", "Before."),
        ("Guide to vllm > Setup", "```sh\n# not a heading\n```"),
        ("Guide to vllm > Setup > Deep_er", "text"),
        ("Guide to vllm > Second", "more"),
        ("Guide to vllm > Empty leaf", "Empty leaf"),
    ]


def test_markdown_without_a_first_level_takes_the_title_of_its_front_matter_or_file(tmp_path: Path) -> None:
    assert sections(read_one(tmp_path, "a.md", "---\ntitle: 'My page'\nx: 1\n---\n## Setup\nGo.\n")) == [
        ("My page > Setup", "Go.")
    ]
    assert sections(read_one(tmp_path, "a.md", "\ufeff## Setup\r\nGo.\r\n")) == [("a > Setup", "Go.")]


def test_html_keeps_what_is_read_and_drops_the_machinery(tmp_path: Path) -> None:
    # no closing </head>, </li>, <noscript> with <nav> in it: all of that is valid or common
    text = (
        "<!doctype html><html><head><title>Site</title><style>p{}</style><body><nav>Menu</nav><noscript><nav>x</nav></noscript>"
        "<h2>First <em>part</em></h2>loose<p>One &amp; two<br>three</p>after<ul><li>a<li>b</ul><script>var x;</script><!-- no -->"
        "<h3>Table</h3><table><tr><td>x</td><td>y</td></tr></table>"
    )
    document = read_one(tmp_path, "page.html", text)
    assert [(path, " ".join(text.split())) for path, text in sections(document)] == [
        ("Site > First part", "loose One & two three after a b"),
        ("Site > First part > Table", "x y"),
    ]


def test_pdf_pages_are_numbered(tmp_path: Path) -> None:
    document = read_one(tmp_path, "report.pdf", pdf("Revenue grew.", "Costs fell.", title="Annual report"))
    assert [(s.path, s.text, s.page) for s in document.sections] == [
        (("Annual report",), "Revenue grew.", 1),
        (("Annual report",), "Costs fell.", 2),
    ]


def test_pdf_that_needs_no_password_to_open_is_read(tmp_path: Path) -> None:
    assert read_one(tmp_path, "a.pdf", encrypted(pdf("Open to read."), user="")).sections[0].text == "Open to read."


def test_bad_files_are_reported_and_the_others_are_read(docs: Path) -> None:
    (docs / "empty.md").touch()
    (docs / "blank.txt").write_text(" \n")
    (docs / "latin.txt").write_bytes("é".encode("latin-1"))
    (docs / "binary.txt").write_bytes(b"a\x00b")
    (docs / "locked.pdf").write_bytes(encrypted(pdf("Secret."), user="secret"))
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing")
    (docs / "scan.pdf").write_bytes(pdf(""))
    (docs / "sheet.xlsx").write_bytes(b"PK")
    (docs / ".hidden.md").write_text("# Hidden\ntext")
    (docs / ".git").mkdir()
    (docs / ".git" / "note.md").write_text("text")
    (docs / os.fsdecode(b"caf\xe9.md")).write_text("text")
    documents, skipped = load(docs)
    assert len(documents) == 4
    reasons = {s.path: s.reason for s in skipped}
    assert reasons.pop("broken.pdf").startswith("cannot be read: ")
    assert reasons == {
        "empty.md": "0 bytes",
        "blank.txt": "no text in it",
        "latin.txt": "not UTF-8 (byte 0)",
        "binary.txt": "not a text file (it holds NUL bytes)",
        "locked.pdf": "protected by a password",
        "scan.pdf": "no text in it",
        "sheet.xlsx": "files of type .xlsx are not supported",
        "caf?.md": "the file name is not UTF-8",
    }


def test_folders_that_others_make_and_remove_meanwhile_do_no_harm(docs: Path) -> None:
    done = Event()

    def churn() -> None:
        while not done.is_set():
            for name in (".incoming-x", "passing"):
                (docs / name).mkdir()
                (docs / name / "file.md").touch()
                (docs / name / "file.md").unlink()
                (docs / name).rmdir()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            found = [document_files(docs) for _ in range(2000)]
        finally:
            done.set()
        churning.result()
    steady = [[p.name for p in paths if p.parent.name != "passing"] for paths in found]
    assert steady == [["cache.txt", "claude-2.md", "monitor.html", "falcon.md"]] * 2000


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_looked_into_is_no_empty_one(docs: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("deep"):
            raise OSError(number, os.strerror(number), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    if number == errno.EACCES:
        documents, skipped = load(docs)
        assert len(documents) == 3 and [s.path for s in skipped] == ["deep"] and "may not be opened" in skipped[0].reason
        assert [p.name for p in document_files(docs)] == ["cache.txt", "claude-2.md", "falcon.md"]
    else:
        with pytest.raises(DataError, match="deep cannot be read: Input/output error"):
            load(docs)


def test_links_that_lead_out_are_not_followed(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.md").write_text("secret")
    (docs / "out.md").symlink_to(tmp_path / "outside.md")
    (docs / "in.md").symlink_to(docs / "claude-2.md")
    (docs / "gone.md").symlink_to(docs / "nothing.md")
    (docs / "loop.md").symlink_to(docs / "loop.md")
    (docs / "up").symlink_to(tmp_path, target_is_directory=True)
    documents, skipped = load(docs)
    assert [d.source for d in documents] == ["cache.txt", "claude-2.md", "deep/monitor.html", "falcon.md", "in.md"]
    assert {s.path: s.reason for s in skipped} == {
        "out.md": "a link that leads out of the folder",
        "gone.md": "a link to a folder or to nothing",
        "loop.md": "a link to a folder or to nothing",
        "up": "a link that leads out of the folder",
    }


@pytest.mark.parametrize("name", ["nothing", "file.md", "empty"])
def test_an_empty_corpus_says_what_came_and_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.md").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sheet.xlsx").touch()
    with pytest.raises(DataError) as raised:
        load(tmp_path / name)
    assert str(tmp_path / name) in raised.value.came
    assert raised.value.next_command == "make index DOCS=path/to/folder"
    if name == "empty":
        assert "sheet.xlsx: files of type .xlsx are not supported" in raised.value.came
