"""Several gateway workers before one real engine: what they count adds up, what one loses is gone, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from monitoring.workers import forget_gauges
from pipelines.config import ROOT
from pipelines.errors import ConfigError
from pipelines.runs import Run
from serving import keys
from serving.launch import serve
from serving.problems import RateLimited
from serving.rates import Rates
from serving.workers import FOLDER, _remove_left
from tests.serving.conftest import MODEL, SETTINGS, TUNED, environment, gone, metric, python_path, serve_config, wait_until
from tests.serving.test_launch import CHAT

SCRIPT = """
import sys
from serving.launch import serve
from serving.settings import load_serve_config
serve("smollm2-135m", load_serve_config("default", sys.argv[1:]), say=lambda line: print(line, flush=True))
"""
SENT = 24
WRITES = """
import os, sys
from monitoring import metrics as m
from monitoring.workers import exposition
from pathlib import Path
m.RAG_REQUESTS.labels(outcome="answered").inc(3)
m.RAG_DURATION.observe(0.3)
m.HTTP_REQUESTS_IN_FLIGHT.set(2)
m.set_index("notes", sys.argv[1], "minilm", 7, 1.0)
folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
print(os.getpid())
print(exposition(folder, [os.getpid()], 1000.0, "engine_text 1\\n").decode())
"""


def write(folder: Path, generation: str) -> tuple[int, str]:
    """Count something in a process of its own, as a worker does; return its id and its exposition."""
    environment = python_path() | {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", WRITES, generation]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    pid, _, text = done.stdout.partition("\n")
    return int(pid), text


def test_what_a_dead_worker_counted_stays_and_what_it_had_under_way_goes(tmp_path: Path) -> None:
    first, text = write(tmp_path, "one")
    assert 'llmlab_rag_requests_total{outcome="answered"} 3.0' in text and "llmlab_http_requests_in_flight 2.0" in text
    _, text = write(tmp_path, "two")
    assert 'llmlab_rag_requests_total{outcome="answered"} 6.0' in text and "llmlab_http_requests_in_flight 4.0" in text
    assert 'llmlab_rag_duration_seconds_bucket{le="0.5"} 2.0' in text and "llmlab_rag_duration_seconds_sum 0.6" in text
    forget_gauges(tmp_path, first)
    _, text = write(tmp_path, "three")
    assert 'llmlab_rag_requests_total{outcome="answered"} 9.0' in text and "llmlab_http_requests_in_flight 4.0" in text
    assert re.findall(r'llmlab_index_info{.*generation="(\w+)"', text) == ["three"], "only what the one that answers knows"
    assert "\nllmlab_index_chunks 7.0" in text and text.endswith("engine_text 1\n\n")
    assert 1000 < float(re.findall(r"\nprocess_cpu_seconds_total ([\d.]+)", text)[0]) < 1100
    assert text.count("# TYPE llmlab_rag_requests_total") == 1 and "pid=" not in text


def test_shares_add_up_to_the_whole() -> None:
    config = serve_config("admission.running=5", "admission.queued=3", "connections.limit=7")
    shares = [config.admission.share(4, 2, number) for number in range(2)]
    assert [share.running for share in shares] == [3, 2] and [share.queued for share in shares] == [2, 1]
    assert [config.connections.share(2, number).limit for number in range(2)] == [4, 3]
    assert [serve_config().admission.share(4, 3, number).running for number in range(3)] == [2, 1, 1]


def test_workers_share_the_rate_of_a_key(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys.json", "alice", "user", 3, None)
    (key,) = keys.read(tmp_path / "keys.json")
    first, second = Rates(tmp_path / "spent.sqlite"), Rates(tmp_path / "spent.sqlite")
    for rates in (first, second, first):
        rates.take_request(key)
    with pytest.raises(RateLimited):
        second.take_request(key)
    first.close(), second.close()


def test_what_a_killed_start_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"{FOLDER}{pid}-abc").mkdir()
    _remove_left(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FOLDER}{os.getpid()}-abc"]


@pytest.mark.slow
def test_more_workers_than_generations_are_refused(tmp_path: Path) -> None:
    with environment(LLMLAB_INDEX=str(tmp_path), LLMLAB_RUNS=str(tmp_path)), pytest.raises(ConfigError, match="share 2 gener"):
        serve(MODEL, serve_config("workers=3"), adapter="none", say=lambda _: None)


@contextmanager
def two_workers(runs: Path, index: Path) -> Iterator[tuple[psutil.Process, str]]:
    variables = python_path() | {"LLMLAB_RUNS": str(runs), "LLMLAB_INDEX": str(index), "LLMLAB_ADMIN_KEY": "secret"}
    command = [sys.executable, "-c", SCRIPT, *SETTINGS, "workers=2", "admission.queued=60", "admission.wait_seconds=60"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables)
    try:
        assert server.stdout
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("ready, with 2 workers"):
                break
        yield psutil.Process(server.pid), re.findall(r"^gateway (\S+)", "".join(lines), re.M)[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def workers_of(server: psutil.Process) -> list[psutil.Process]:
    return [child for child in server.children() if "serving.worker" in child.cmdline()]


def metrics_folder(server: psutil.Process) -> Path:
    return Path(workers_of(server)[0].environ()["PROMETHEUS_MULTIPROC_DIR"])


def ask(url: str, path: str, body: dict[str, object]) -> int:
    return httpx.post(url + path, json=body, trust_env=False, timeout=120).status_code  # each on a connection of its own


def answered(folder: Path, pid: int) -> float:
    """Return how many chats a worker answered, from its own file."""
    from prometheus_client.multiprocess import MultiProcessCollector

    families = MultiProcessCollector.merge([str(folder / f"counter_{pid}.db")])
    samples = [s for f in families for s in f.samples if s.name == "llmlab_generation_requests_total"]
    return sum(s.value for s in samples if s.labels["outcome"] == "ok")


@pytest.mark.slow
def test_two_workers_before_one_engine(tuned_run: Run, index_root: Path) -> None:
    with two_workers(tuned_run.path.parents[2], index_root) as (server, url):
        processes, folder = server.children(recursive=True), metrics_folder(server)
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            check_sums(http, url, folder, [worker.pid for worker in workers_of(server)])
            check_refusals(http)
            check_a_killed_worker(http, url, server)
            check_a_killed_engine(http, server)
        processes += server.children(recursive=True)
    assert gone(processes) and not folder.exists()


def check_sums(http: httpx.Client, url: str, folder: Path, pids: list[int]) -> None:
    """Spread requests over both, and find in each scrape exactly what was sent."""
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda _: ask(url, "/v1/chat/completions", CHAT), range(SENT))) == {200}
    question = {"question": "Who made Vela?", "model": TUNED, "max_tokens": 2}
    assert ask(url, "/v1/rag/query", question) == 200
    shares = [answered(folder, pid) for pid in pids]
    assert all(shares) and sum(shares) == SENT + 1, shares
    wait_until(lambda: metric(http, "llmlab_http_requests_in_flight") == 1)
    for _ in range(6):  # new connections, so that both are asked
        with httpx.Client(base_url=url, trust_env=False) as other:
            counted = [metric(other, "llmlab_generation_requests_total", outcome="ok", model=model) for model in (MODEL, TUNED)]
            assert counted == [SENT, 1]
            assert metric(other, "llmlab_rag_requests_total") == 1
            assert metric(other, "llmlab_generation_duration_seconds_count", model=MODEL) == SENT
            assert metric(other, "llmlab_engine_up", engine="llamacpp") == 1
            assert metric(other, "llmlab_engine_slots", engine="llamacpp") == 2
            assert metric(other, "llmlab_index_info", embedder="minilm") == 1
            assert metric(other, "llmlab_model_info", model=TUNED) == 1
            assert metric(other, "llmlab_admission_running") == 0
            assert metric(other, "llmlab_http_requests_in_flight") == 1
            assert metric(other, "process_resident_memory_bytes") > sum(memory(pid) for pid in pids)
    text = http.get("/metrics").text
    assert "pid=" not in text and text.count("# TYPE llmlab_engine_up ") == 1


def memory(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) * 0.9


def check_refusals(http: httpx.Client) -> None:
    """What would change one worker only is refused, with the way on."""
    admin = {"Authorization": "Bearer secret"}
    assert http.get("/v1/adapters", headers=admin).json()["data"][0]["name"] == TUNED
    for reply in (
        http.post("/v1/adapters", headers=admin, json={"run": "latest"}),
        http.delete(f"/v1/adapters/{TUNED}", headers=admin),
        http.post("/v1/documents", headers=admin, files={"file": ("new.md", b"# New")}),
        http.delete("/v1/documents/vela.md", headers=admin),
    ):
        assert reply.status_code == 501 and "workers=1" in reply.json()["error"]["message"], reply.text


def check_a_killed_worker(http: httpx.Client, url: str, server: psutil.Process) -> None:
    """Its counters stay, its gauges go, the other serves on, and another takes its place."""
    before = workers_of(server)
    body = CHAT | {"stream": True, "max_tokens": 400, "ignore_eos": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, trust_env=False, timeout=60) as reply:
        lines = reply.iter_lines()  # held, since the reply is closed with it
        next(lines)
        assert metric(http, "llmlab_admission_running") == 1
        busy = holder(server, before)
        cpu = metric(http, "process_cpu_seconds_total")
        busy.kill()
        busy.wait(10)
    wait_until(lambda: metric_of_new(url, "llmlab_admission_running") == 0)
    assert metric_of_new(url, "llmlab_generation_requests_total", outcome="ok", model=MODEL) == SENT
    wait_until(lambda: len(workers_of(server)) == 2 and {w.pid for w in workers_of(server)} != {w.pid for w in before})
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: ask(url, "/v1/chat/completions", CHAT), range(4))) == {200}
    assert metric_of_new(url, "llmlab_generation_requests_total", outcome="ok", model=MODEL) == SENT + 4
    assert metric_of_new(url, "process_cpu_seconds_total") >= cpu


def holder(server: psutil.Process, workers: list[psutil.Process]) -> psutil.Process:
    """Return the worker that has a generation under way, by its own gauge file."""
    from prometheus_client.multiprocess import MultiProcessCollector

    for worker in workers:
        families = MultiProcessCollector.merge([str(metrics_folder(server) / f"gauge_livesum_{worker.pid}.db")])
        if any(s.name == "llmlab_admission_running" and s.value for f in families for s in f.samples):
            return worker
    raise AssertionError("no worker has a generation under way")


def metric_of_new(url: str, name: str, **labels: str) -> float:
    """Return a series as a new connection sees it; one to a worker that was killed is of no use."""
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        return metric(http, name, **labels)


def check_a_killed_engine(http: httpx.Client, server: psutil.Process) -> None:
    """Every worker hears that the engine is down, and that it is back."""
    leash = next(child for child in server.children() if any("leash" in word for word in child.cmdline()))
    url = str(http.base_url).rstrip("/")
    leash.children()[0].kill()
    wait_until(lambda: metric_of_new(url, "llmlab_engine_up") == 0)
    wait_until(lambda: metric_of_new(url, "llmlab_engine_up") == 1)
    assert metric_of_new(url, "llmlab_engine_restarts_total") == 1
    assert ask(url, "/v1/chat/completions", CHAT) == 200
