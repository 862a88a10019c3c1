"""Stopping `llmlab serve` while it works: what is in flight ends, nothing new begins, and a second signal waits for nobody."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from pipelines.config import ROOT
from tests.serving.conftest import MODEL, SETTINGS, descendants, fake_running, gone, python_path, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "stream": True, "ignore_eos": True}


def test_a_drain_refuses_what_is_new_and_waits_for_what_is_not(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        body = CHAT | {"messages": [{"role": "user", "content": "hang"}], "stream": False}
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, trust_env=False))

    with fake_running(tmp_path, "drain_seconds=1") as served, httpx.Client(base_url=served.url, trust_env=False) as client:
        thread = threading.Thread(target=ask, args=(served.url,))
        thread.start()
        wait_until(lambda: served.service.admission._running, 5)
        served.service.drain.begin()
        for answer in (client.get("/readyz"), client.post("/v1/chat/completions", json=CHAT), client.get("/v1/models")):
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
            assert answer.headers["Connection"] == "close"
        assert client.get("/healthz").status_code == 200
        thread.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "server_stopping"
        with pytest.raises(httpx.ConnectError):
            wait_until(lambda: client.get("/healthz").status_code != 200, 5)


def start(tmp_path: Path, *overrides: str) -> tuple[subprocess.Popen[str], str]:
    settings = [word for override in (*SETTINGS, *overrides) for word in ("--set", override)]
    command = [sys.executable, "-W", "error", "-m", "labs", "serve", MODEL, "--adapter", "none", *settings]
    variables = python_path() | {"LLMLAB_INDEX": str(tmp_path), "LLMLAB_RUNS": str(tmp_path), "COLUMNS": "300"}
    process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout
    while not any("ready" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return process, next(word for line in lines for word in line.split() if word.startswith("http://"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ends in time", "is cut", "second signal"])
def test_a_stream_across_a_signal(tmp_path: Path, case: str) -> None:
    tokens, seconds = (200, 60) if case == "ends in time" else (900, 1 if case == "is cut" else 30)
    process, url = start(tmp_path, f"drain_seconds={seconds}")
    others = descendants(process.pid)
    with httpx.Client(trust_env=False, timeout=60) as client:
        with client.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"max_tokens": tokens}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 503, 10)
            assert time.monotonic() - began < 5
            refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT, trust_env=False)
            assert refused.status_code == 503 and refused.headers["Connection"] == "close" and "Retry-After" in refused.headers
            if case == "second signal":
                process.send_signal(signal.SIGINT)
            data = [line.removeprefix("data: ") for line in lines if line]
            assert (data[-1] == "[DONE]") == (case == "ends in time")
            if case != "ends in time":
                assert json.loads(data[-1])["error"]["code"] == "server_stopping" and time.monotonic() - began < 15
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.rstrip().endswith("stopped") and "Traceback" not in output, output
    wait_until(lambda: gone(others), 20)
