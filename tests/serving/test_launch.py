"""From start to stop: refusals before anything starts, an engine that dies in service, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines import catalogue
from pipelines.config import ROOT
from pipelines.errors import (
    ConfigError,
    EngineError,
    FingerprintMismatch,
    PortInUse,
    RehearsalRefused,
    RunIncomplete,
    UnknownName,
)
from pipelines.runs import Run
from serving import launch
from serving.address import listen
from serving.launch import Running, running
from tests.serving.conftest import (
    MODEL,
    SETTINGS,
    TUNED,
    descendants,
    environment,
    fake_running,
    fake_service,
    gone,
    make_run,
    metric,
    python_path,
    serve_config,
    wait_until,
)

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
SCRIPT = """
import sys
from serving.launch import serve
from serving.settings import load_serve_config
serve("smollm2-135m", load_serve_config("default", sys.argv[1:]), adapter="none", say=lambda line: print(line, flush=True))
"""


def start(adapter: str = "latest", *overrides: str, runs: Path) -> None:
    with environment(LLMLAB_RUNS=str(runs)), running(MODEL, serve_config(*overrides), adapter=adapter, say=lambda _: None):
        raise AssertionError("it must not start")


def test_a_killed_engine_is_reported_and_comes_back(lab: Running, http: httpx.Client) -> None:
    supervisor = lab.service.supervisor
    restarts = metric(http, "llmlab_engine_restarts_total", engine="llamacpp")
    (engine,) = descendants(supervisor._process.pid)
    engine.send_signal(signal.SIGKILL)
    wait_until(lambda: not supervisor.status.up)
    for response in (http.get("/readyz"), http.post("/v1/rag/query", json={"question": "Who made Vela?"})):
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert "SIGKILL" in response.json()["error"]["message"]
    chat = http.post("/v1/chat/completions", json=CHAT)
    assert chat.status_code == 503 and chat.json()["error"]["code"] == "engine_unavailable"
    assert metric(http, "llmlab_engine_up", engine="llamacpp") == 0
    wait_until(lambda: http.get("/readyz").status_code == 200)
    assert http.post("/v1/chat/completions", json=CHAT | {"model": TUNED}).status_code == 200
    assert metric(http, "llmlab_engine_restarts_total", engine="llamacpp") == restarts + 1


def kill_under_load(server: Running, times: int) -> None:
    """Six streams at two slots, and the engine gone: each ends with an error or had ended, and the next ones are answered."""

    def ask(_: int) -> str:
        body = CHAT | {"max_tokens": 400, "stream": True, "ignore_eos": True}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).text

    supervisor, admission = server.service.supervisor, server.service.admission
    with ThreadPoolExecutor(6) as pool:
        for _ in range(times):
            answers = [pool.submit(ask, number) for number in range(6)]
            wait_until(lambda: len(admission._running) == 2)
            descendants(supervisor._process.pid)[0].kill()
            wait_until(lambda: not supervisor.status.up)
            ended = [answer.result(timeout=30) for answer in answers]
            assert all("[DONE]" in text or '"error"' in text for text in ended)
            assert any("engine_unavailable" in text for text in ended)
            assert not any("Traceback" in text for text in ended)
            wait_until(lambda: supervisor.status.up, 60)
            assert not admission._running
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60, trust_env=False).status_code == 200


@pytest.mark.slow
def test_an_engine_that_is_killed_under_load_leaves_nobody_waiting(lab: Running) -> None:
    kill_under_load(lab, 3)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_an_engine_is_killed_under_load_twenty_times() -> None:
    with running(MODEL, serve_config("restart.settled_seconds=0.1", "index=none"), say=lambda _: None) as server:
        kill_under_load(server, 20)


def test_without_index_and_adapter_the_rest_works(tmp_path: Path) -> None:
    with fake_service(tmp_path) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [MODEL, "minilm"]
        response = client.post("/v1/rag/query", json={"question": "Who made Vela?"})
        assert response.status_code == 503 and "make index" in response.json()["error"]["next"]
        assert client.get("/readyz").status_code == 200


def test_an_engine_that_stands_still_is_told_from_one_that_is_gone(tmp_path: Path) -> None:
    with fake_running(tmp_path) as server, httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        engine = descendants(server.service.supervisor._process.pid)[0]
        engine.suspend()
        try:
            response = client.get("/metrics/engine")
            assert response.status_code == 503 and "TimeoutError" in response.json()["error"]["message"]
            assert client.get("/readyz").status_code == 503
        finally:
            engine.resume()


def test_an_engine_that_fails_within_a_request(tmp_path: Path) -> None:
    def chat(client: httpx.Client, text: str, **more: Any) -> httpx.Response:
        return client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": text}]} | more)

    with fake_service(tmp_path, "request_seconds=0.5") as client:
        silent = chat(client, "hang")
        assert silent.status_code == 504 and silent.json()["error"]["code"] == "timeout"
        broken = chat(client, "break")
        assert broken.status_code == 502 and "out of order" in broken.json()["error"]["message"]
        nonsense = chat(client, "nonsense", stream=True)
        assert nonsense.status_code == 500 and "unexpected error" in nonsense.json()["error"]["message"]
        dead = chat(client, "die", stream=True)
        *_, half, last = [json.loads(line[6:]) for line in dead.text.splitlines() if line.startswith("data: {")]
        assert half["choices"][0]["delta"]["content"] == "half"
        assert last["error"]["code"] == "engine_unavailable" and "[DONE]" not in dead.text


def test_a_taken_port_names_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for override, way_on in ((f"port={port}", "--port"), (f"engine_port={port}", "engine_port")):
            with pytest.raises(PortInUse) as caught:
                start("none", override, runs=Path("none"))
            assert f"127.0.0.1:{port}" in caught.value.came and "process" in caught.value.came
            assert way_on in caught.value.next_command


def test_connections_send_at_once() -> None:
    """Without TCP_NODELAY the end of each answer, and tokens that come fast, waited 40 ms for the client's acknowledgement."""

    async def accepted() -> int:
        options: list[int] = []

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        address = listen("127.0.0.1", 0, "")
        async with await asyncio.start_server(connected, sock=address):
            reader, writer = await asyncio.open_connection(*address.getsockname())
            await reader.read()
            writer.close()
        return options[0]

    assert asyncio.run(accepted())


@pytest.mark.parametrize(("override", "words"), [("host=nowhere.invalid", "not an address"), ("host=192.0.2.1", "cannot be")])
def test_an_address_of_another_machine(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start("none", override, runs=Path("none"))


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_tokens is 100000"):
        start("none", "context_tokens=100000", runs=Path("none"))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no run is named"):
        start("20200101T000000Z-abcdef12", runs=tmp_path)
    with pytest.raises(UnknownName, match="smollm2-135m"), running("smollm", serve_config(), say=lambda _: None):
        pass
    with pytest.raises(ConfigError, match="ollama"):
        start("none", "engine=ollama", runs=tmp_path)


def test_a_broken_base_shows_the_engines_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    monkeypatch.setattr("pipelines.export.base.base_gguf", lambda *_, **__: broken)
    monkeypatch.setattr(launch, "WORK", tmp_path)
    with pytest.raises(EngineError, match="failed to load model"):
        start("none", runs=tmp_path)


@pytest.fixture(scope="module")
def odd_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Run]:
    """A rehearsal, and a run whose template lock is not the engine's."""
    rehearsals, mismatched = tmp_path_factory.mktemp("rehearsals"), tmp_path_factory.mktemp("mismatched")
    lock = {"golden": [{"messages": [{"role": "user", "content": "Hello"}], "token_ids": [1, 2, 3]}]}
    return rehearsals, make_run(rehearsals, seed=1, rehearsal=True), make_run(mismatched, seed=2, lock=lock)


def test_a_rehearsal_is_refused_unless_named(odd_runs: tuple[Path, Run, Run]) -> None:
    from serving.tuned import choose_run

    root, rehearsal, _ = odd_runs
    with pytest.raises(RehearsalRefused, match=rehearsal.id):
        start(runs=root)
    with environment(LLMLAB_RUNS=str(root)):
        assert choose_run(catalogue.find(MODEL), rehearsal.id) == rehearsal


def test_another_chat_template_is_refused(odd_runs: tuple[Path, Run, Run]) -> None:
    run = odd_runs[2]
    with pytest.raises(FingerprintMismatch, match="golden chat 0"):
        start(runs=run.path.parents[2])


def test_a_changed_run_is_refused(tuned_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "finetune" / MODEL / tuned_run.id
    shutil.copytree(tuned_run.path, copy)
    with (copy / "adapter.gguf").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RunIncomplete, match="adapter.gguf"):
        start(runs=tmp_path)


def serving_process(tmp_path: Path) -> tuple[subprocess.Popen[str], list[str], list[Any]]:
    """Start `serve` as the command line would; return it, what it said, and its descendants."""
    values = environment_of(tmp_path)
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *SETTINGS]
    process = subprocess.Popen(command, env=values, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert process.stdout
    while not any("ready" in line for line in lines):
        line = process.stdout.readline()
        assert line, lines
        lines.append(line)
    return process, lines, descendants(process.pid)


def environment_of(tmp_path: Path) -> dict[str, str]:
    return python_path() | {"LLMLAB_INDEX": str(tmp_path), "LLMLAB_RUNS": str(tmp_path)}


SLOWER = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [*SLOWER, signal.SIGKILL])
def test_nothing_is_left_running(tmp_path: Path, number: signal.Signals) -> None:
    process, lines, others = serving_process(tmp_path)
    assert len(others) == 2, "the leash and the engine"
    url = next(word for line in lines for word in line.split() if word.startswith("http://"))
    assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 200
    process.send_signal(number)
    last_words, _ = process.communicate(timeout=60)
    wait_until(lambda: gone(others), 30)
    if number != signal.SIGKILL:
        request, stopped = last_words.splitlines()
        assert process.returncode == 0 and stopped == "stopped" and "route=/v1/models status=200" in request


def test_ctrl_c_while_the_engine_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, *SETTINGS]
    process = subprocess.Popen(command, env=environment_of(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    others = wait_until(lambda: descendants(process.pid))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].decode()
    assert said.endswith("stopped\n") and "Traceback" not in said, said
    assert process.returncode in (0, -signal.SIGINT)  # CPython's own end if the signal fell into an exec, as of a dataclass
    wait_until(lambda: gone(others), 30)


SWALLOWING = """
import os, signal, sys, time
from serving.launch import serve
from serving.settings import load_serve_config
def say(line):
    print(line, flush=True)
    if line.startswith("index"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
serve("smollm2-135m", load_serve_config("default", sys.argv[1:]), adapter="none", say=say)
"""


def test_ctrl_c_that_a_library_swallows_still_stops(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SWALLOWING, *SETTINGS]
    done = subprocess.run(
        command, env=environment_of(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ready" not in done.stdout and done.stdout.endswith("stopped\n")
