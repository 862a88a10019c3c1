"""Ray: the index is the one that a single process makes, errors are the same, and nothing is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.config import ROOT
from pipelines.errors import ConfigError, DataError, FingerprintMismatch, LabError
from pipelines.rag import generation, scale, uploads
from pipelines.rag.embed import Embedder, load_counter, load_embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.load import Skipped, files_below
from pipelines.rag.scale import RayMissing, RayWorkers, WorkerFailed, on_ray
from pipelines.rag.workers import Cut, Here

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make setup-ray")
OTHER_FILES = {
    "table.csv": "model,licence\nPhi-2,MIT\nFalcon 40B,Apache 2.0\n",
    "records.json": '[{"title": "Mistral", "text": "Mistral 7B came in September 2023."}]',
    "code.py": 'def answer() -> int:\n    """Return what was asked for."""\n    return 42\n',
    "broken.json": "{",
    "empty.md": "",
    "long.txt": "A sentence of eight words stands here now. " * 120,
}


@pytest.fixture
def many_kinds(docs: Path) -> Path:
    """Return a folder with several types of file, two of them unreadable."""
    for name, text in OTHER_FILES.items():
        (docs / name).write_text(text)
    (docs / os.fsdecode(b"latin-\xe9.txt")).write_text("A file whose name is not UTF-8.")
    return docs


def backwards(_: RayWorkers, make: Callable[[], scale.Work], sent: list[str]) -> Iterator[tuple[int, bytes]]:
    work = make()
    yield from [(place, work(sent[place])) for place in reversed(range(len(sent)))]


def remember(seen: list[tuple[str, int, int]]) -> Callable[[str, int, int], None]:
    return lambda step, done, total: seen.append((step, done, total))


def ray_processes() -> dict[psutil.Process, str]:
    """Return the living processes of Ray that this one started, each with its name and command."""
    living = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end, or become a zombie, while it is looked at
            parts = [process.name(), *process.cmdline()]
            if any(part.startswith("ray") for part in parts):
                living[process] = " ".join(parts)
    return living


def test_without_ray_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, hash_embedder: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayMissing, match="make setup-ray"), on_ray(hash_embedder, "minilm", 2):
        pass


def test_workers_without_ray_are_refused(docs: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "labs", "index", "sync", str(docs), "--workers", "2"], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "--engine ray" in done.stderr


@pytest.mark.parametrize("name", ["minilm", "minilm-int8"])
def test_what_comes_in_another_order_is_the_same(
    many_kinds: Path, config: RagConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(RayWorkers, "_each", backwards)
    embedder = load_embedder(name, threads=1)
    sync(many_kinds, "here", config, embedder)
    sync(many_kinds, "there", config, embedder, None, RayWorkers(embedder, name, 2))
    here, there = open_index("here", embedder), open_index("there", embedder)
    assert len(here) > scale.PASSAGES_AT_ONCE and len(here.documents) > scale.FILES_AT_ONCE - 1
    assert (here.chunks, here.documents) == (there.chunks, there.documents)
    assert here.manifest["skipped"] == there.manifest["skipped"]
    assert np.array_equal(here.vectors.rows, there.vectors.rows)


def test_only_files_that_changed_are_parsed(
    docs: Path, config: RagConfig, monkeypatch: pytest.MonkeyPatch, minilm: Embedder
) -> None:
    monkeypatch.setattr(RayWorkers, "_each", backwards)
    workers = RayWorkers(minilm, "minilm", 2)
    sync(docs, "lab", config, minilm, None, workers)
    (docs / "falcon.md").write_text("# Falcon 40B\n\nFalcon says more now.\n")
    found = workers.cut(files_below(docs, open_index("lab", minilm).documents), 48, remember([]))
    assert [c.source for c in found if isinstance(c, Cut) and c.chunks is not None] == ["falcon.md"]
    assert len(found) == 4


def test_the_counter_counts_as_the_embedder(minilm: Embedder) -> None:
    for text in ("", "A KV cache.", "naïve 東京"):
        assert load_counter("minilm")(text) == minilm.token_count(text)


@pytest.mark.parametrize("error", [DataError("came", "expected", "next"), uploads.NoDocuments("only this")])
def test_errors_arrive_as_they_were(error: LabError) -> None:
    came = scale._came_error(scale._sent_error(error))
    assert type(came) is type(error) and str(came) == str(error)


def test_files_arrive_as_they_were(many_kinds: Path) -> None:
    before = [Skipped("empty.md", "0 bytes", "ab")]
    for file in files_below(many_kinds, {"falcon.md": "cd"}, before):
        assert scale._came_file(json.loads(json.dumps(scale._sent_file(file)))) == file


def test_a_worker_of_another_version_is_refused() -> None:
    with pytest.raises(FingerprintMismatch, match="version 0"):
        scale._cutting("minilm", 48, 0)
    with pytest.raises(FingerprintMismatch, match="embedder ffff"):
        scale._embedding("minilm", "f" * 64)


@with_ray
@pytest.mark.slow
def test_two_workers_make_the_index_that_one_process_makes(
    many_kinds: Path, config: RagConfig, minilm: Embedder, report_figure: Callable[[str], None]
) -> None:
    uploads.put(uploads.folder_of("here"), "notes/faq.md", b"# FAQ\n\nA document that was uploaded.\n")
    uploads.put(uploads.folder_of("there"), "notes/faq.md", b"# FAQ\n\nA document that was uploaded.\n")
    seen: list[tuple[str, int, int]] = []
    started = time.perf_counter()
    with on_ray(minilm, "minilm", 2) as workers:
        report_figure(f"Ray started in {time.perf_counter() - started:.1f} s")
        running = ray_processes()
        here = sync(many_kinds, "here", config, minilm)
        there = sync(many_kinds, "there", config, minilm, remember(seen), workers)
        report_figure(f"synced by Ray in {there.seconds:.1f} s, here in {here.seconds:.1f} s")
        assert (here.change, here.skipped) == (there.change, there.skipped) and len(there.skipped) == 3
        same(minilm)
        assert [total for step, done, total in seen if step == "embed" and done == total] == [there.change.to_embed]

        (many_kinds / "falcon.md").write_text("# Falcon 40B\n\n## Size\nFalcon has 40 billion parameters, and says more now.\n")
        seen.clear()
        assert sync(many_kinds, "there", config, minilm, remember(seen), workers).change.to_embed == 1
        assert [(done, total) for step, done, total in seen if step == "embed"] == [(1, 1)]
        sync(many_kinds, "here", config, minilm)
        same(minilm)

        with pytest.raises(DataError) as local:
            Here(minilm).embed(["a " * 400], remember([]))
        with pytest.raises(DataError) as remote:
            workers.embed(["a " * 400], remember([]))
        assert str(remote.value) == str(local.value)

        without_token = "import os, ray; ray.init(os.environ['AT'], log_to_driver=False)"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment["AT"] = import_module("ray").get_runtime_context().gcs_address
        with subprocess.Popen(
            [sys.executable, "-c", without_token], env=environment, stderr=subprocess.PIPE, text=True
        ) as stranger:
            assert stranger.stderr and any("InvalidAuthToken" in line for line in stranger.stderr)
            stranger.kill()  # it would try again for long

        listening = []
        for process in (psutil.Process(), *ray_processes()):
            with suppress(psutil.NoSuchProcess):
                listening += [c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"]
        assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

        def kill_workers(*_: object) -> None:
            for process, command in ray_processes().items():
                if "MapWorker" in command:
                    with suppress(psutil.Error):
                        process.kill()

        with pytest.raises(WorkerFailed, match="a worker of Ray failed"):
            workers.embed([f"passage {n}" for n in range(2000)], kill_workers)
    assert running and not ray_processes()


def same(embedder: Embedder) -> None:
    here, there = open_index("here", embedder), open_index("there", embedder)
    assert here.chunks == there.chunks and list(here.documents.items()) == list(there.documents.items())
    np.testing.assert_allclose(there.vectors.rows, here.vectors.rows, atol=1e-5, rtol=0)
    varying = {"generation", "created", "files"}
    assert {k: v for k, v in here.manifest.items() if k not in varying} == {
        k: v for k, v in there.manifest.items() if k not in varying
    }
    assert here.manifest["files"]["chunks.sqlite"] == there.manifest["files"]["chunks.sqlite"]


@with_ray
@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_generation(many_kinds: Path) -> None:
    for n in range(40):
        (many_kinds / f"page-{n}.md").write_text(f"# Page {n}\n\n" + f"The text of page {n} goes on. " * 60)
    command = [sys.executable, "-m", "labs", "index", "sync", str(many_kinds), "--engine", "ray", "--workers", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as program:
        assert program.stderr
        lines = []
        while not lines or not lines[-1].startswith("chunk"):
            lines.append(program.stderr.readline())
            assert lines[-1], lines
        running = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        lines += program.communicate(timeout=60)[1].split("\n")
    assert program.returncode == 130
    assert [re.split("[:;]", line)[0] for line in lines if line.strip()] in (["chunk", "interrupted"],
                                                                             ["chunk", "embed", "interrupted"])  # fmt: skip
    assert len(running) > 4 and not [p for p in running if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert generation.current(generation.folder_of("knowledge")) is None


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "127.0.0.1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="RAY_ADDRESS is"):
        scale._check_reachable(address)


def test_a_cluster_that_is_not_there_is_noticed_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            scale._check_reachable(f"127.0.0.1:{taken.getsockname()[1]}")


def test_the_environment_of_a_cluster_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dict(os.environ)
    try:
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        scale._set_environment(local=False)
        assert "RAY_AUTH_MODE" not in os.environ and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    finally:
        os.environ.clear()
        os.environ.update(kept)
