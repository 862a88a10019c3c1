"""`llmlab data from-docs` as a user runs it, against the real gateway and engine; and what is refused."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.config import ROOT
from pipelines.rag.answer import parse
from pipelines.tune.files import read_rows
from pipelines.tune.questions import holds
from serving.launch import Running
from tests.serving.conftest import MODEL, TUNED

PAGES = {
    "vela.md": "# Vela\n\nVela is a language model. It was made by Orion Labs and has 9 billion parameters.\n",
    "boiler.txt": "The boiler was installed by Peak Heating Ltd on 9 September 2021. The warranty runs for seven years.\n",
    "move.html": "<h1>Library move</h1><p>Dr Helen Pryce will lead the move. Packing begins on 2 September.</p>",
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in PAGES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def command(docs: Path, out: Path, port: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "labs", "data", "from-docs", str(docs), "--out", str(out), "--port", port, *options]


def run(docs: Path, out: Path, port: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        command(docs, out, port, *options), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def refused(docs: Path, out: Path, port: str, *options: str, status: int = 1) -> str:
    done = run(docs, out, port, *options)
    assert "Traceback" not in done.stderr and done.returncode == status, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def port(lab: Running) -> str:
    return lab.url.rpartition(":")[2]


@pytest.mark.slow
def test_rows_of_real_documents_by_the_real_engine(docs: Path, tmp_path: Path, port: str) -> None:
    """Interrupted once: what is done stays, the same command goes on, and every row can be learnt from."""
    out, journal = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.journal"
    with subprocess.Popen(command(docs, out, port), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_text().count("\n") > 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert process.returncode in (130, 0), said  # 0 if it was faster than the signal
    finished = {json.loads(line)["chunk"] for line in journal.read_text().splitlines()[1:]}
    first = [line for line in out.read_text().splitlines(keepends=True) if json.loads(line)["group"] in finished]
    done = run(docs, out, port)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert (made["documents"], made["chunks"], made["chunks_done"]) == (3, 3, 3)
    assert made["asked"] == made["kept"] + sum(made["dropped"].values()) and made["seconds"] > 0
    assert finished and out.read_text().startswith("".join(first))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(read_rows(out)) == len(rows) == made["kept"] >= 2
    for row in rows:
        assert row["question"].endswith("?") and not holds(row["question"], row["answer"])
        assert holds(" ".join(PAGES[row["source"]].split()), row["answer"])
        reply = parse(row["messages"][-1]["content"], 3)
        assert reply.abstained == row["withheld"] and bool(reply.cited) != row["withheld"]


def test_wrong_input_is_explained(docs: Path, tmp_path: Path, port: str) -> None:
    out = tmp_path / "rows.jsonl"
    assert f"one of {MODEL}, {TUNED}" in refused(docs, out, port, "--model", "mistral-7b", status=2)
    assert "next:     llmlab data from-docs" in refused(tmp_path / "nowhere", out, port)
    (tmp_path / "empty").mkdir()
    assert "holds no readable document" in refused(tmp_path / "empty", out, port)
    assert "mkdir -p" in refused(docs, tmp_path / "nowhere" / "rows.jsonl", port, status=2)
    assert "ends with .jsonl" in refused(docs, tmp_path / "rows.csv", port, status=2)
    out.write_text("{}\n")
    assert "has not begun it" in refused(docs, out, port)
    assert out.read_text() == "{}\n"


def test_without_a_server_it_says_how_to_start_one(docs: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    assert "make serve" in refused(docs, tmp_path / "rows.jsonl", free)
    assert not list(tmp_path.glob("rows*"))


class Stranger(http.server.BaseHTTPRequestHandler):
    """A server of something else, which knows JSON."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'["welcome"]')

    def log_message(self, *_: object) -> None:
        pass


def test_something_that_is_not_the_gateway_is_explained(docs: Path, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "not this gateway" in refused(docs, tmp_path / "rows.jsonl", str(server.server_port))
        server.shutdown()
