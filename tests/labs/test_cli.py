"""The command line as users meet it: help, status codes, messages; every wrong input without a traceback."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from labs.cli import app
from pipelines.runs import Run

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "doctor",
    "models",
    "show",
    "plan",
    "pull",
    "finetune",
    "eval",
    "index",
    "serve",
    "ask",
    "monitor",
    "dashboards",
    "labs",
    "lab",
    "demo",
)


def llmlab(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labs", *arguments]
    environment = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


def refused(*arguments: str, status: int, **variables: str) -> str:
    done = llmlab(*arguments, **variables)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, done.stderr
    return done.stderr


def test_help_lists_every_command() -> None:
    text = llmlab("--help").stdout
    assert all(re.search(rf"^  {command} ", text, re.M) for command in COMMANDS)
    for command in COMMANDS:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_an_unknown_model_gets_the_names_and_the_nearest() -> None:
    for command in ("finetune", "show", "plan", "eval", "serve"):
        message = refused(command, "mistral7b", status=2)
        assert "did you mean mistral-7b?" in message and "smollm2-135m" in message


def test_all_problems_of_an_override_are_told() -> None:
    message = refused("finetune", "--set", "lora.rank=-1", "--set", "schedule.pace=2", status=2)
    assert "lora.rank" in message and "schedule.pace: unknown key" in message


def test_a_metrics_port_that_is_none_is_refused() -> None:
    assert "0 to 65535, auto or none" in refused("finetune", "--metrics-port", "80000", status=2)


def test_an_unknown_recipe_or_engine_is_refused() -> None:
    assert "lora-quick" in refused("finetune", "--recipe", "lora-quik", status=2)
    assert "llamacpp" in refused("serve", "--engine", "tensorrt", status=2)


def test_a_model_without_a_run_cannot_be_evaluated(tmp_path: Path) -> None:
    message = refused("eval", "smollm2-135m", status=1, LLMLAB_RUNS=str(tmp_path))
    assert "make finetune MODEL=smollm2-135m" in message


def test_a_run_without_a_manifest_is_refused(tuned_run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "finetune" / "smollm2-135m" / "20260101T000000Z-00000000"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    assert "no run is named" in refused("runs", "show", broken.name, status=2, LLMLAB_RUNS=str(tmp_path))
    shown = llmlab("runs", "show", tuned_run.id)
    assert "Passport" in shown.stdout and "HuggingFaceTB/SmolLM2-135M-Instruct" in shown.stdout
    assert tuned_run.id in llmlab("runs", "list").stdout and tuned_run.id in llmlab("runs").stdout


def test_training_groups_can_be_looked_at() -> None:
    done = llmlab("data", "show", "reader", "--rows", "2")
    assert done.returncode == 0 and done.stdout.count("  ->  ") == 8
    assert "reader" in refused("data", "show", "raeder", status=2)


def test_a_run_of_another_model_is_not_evaluated(tuned_run: Run) -> None:
    assert "finetune of smollm2-135m" in refused("eval", "mistral-7b", "--run", tuned_run.id, status=1)


def test_asking_something_that_is_not_the_gateway_is_explained() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert "not this gateway" in refused("ask", "Who?", "--port", str(server.server_port), status=1)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_an_empty_corpus_is_refused_and_the_old_index_stays(tmp_path: Path) -> None:
    docs, index = tmp_path / "docs", {"LLMLAB_INDEX": str(tmp_path / "index")}
    docs.mkdir()
    (docs / "a.md").write_text("# A\n\nOne page about nothing in particular.\n")
    (docs / "empty.md").write_bytes(b"")
    (docs / "latin.txt").write_bytes("naïve".encode("utf-16"))
    done = llmlab("index", "sync", str(docs), **index)
    assert json.loads(done.stdout.splitlines()[-1])["skipped"] == 2
    assert "empty.md" in done.stderr and "latin.txt" in done.stderr
    (docs / "b.md").write_text("# B\n\nAnother page.\n")
    compared = llmlab("index", "diff", str(docs), **index)
    assert "+ b.md" in compared.stderr
    assert json.loads(compared.stdout.splitlines()[-1])["added"] == 1
    assert "knowledge" in llmlab("index", "list", **index).stdout
    (docs / "b.md").unlink()
    (docs / "a.md").unlink()
    refused("index", "sync", str(docs), status=1, **index)
    refused("index", "sync", str(tmp_path / "nowhere"), status=1, **index)
    assert len(list((tmp_path / "index" / "knowledge").glob("*/manifest.json"))) == 1


def test_embedders_are_listed_and_an_unknown_one_gets_the_nearest() -> None:
    listed = llmlab("index", "embedders").stdout
    for name, here in (("wordllama", "yes"), ("minilm-int8", "yes"), ("e5-small", "no")):
        assert re.search(rf"│ {name} +│ {here} ", listed), name
    assert "did you mean wordllama?" in refused("index", "diff", "--set", "embedder=wordlama", status=2)
    assert "did you mean bge-small-en?" in refused("pull", "bge-small", status=2)
    assert "the hub cannot be reached" in refused("pull", "bge-small-en", status=3, HF_HUB_OFFLINE="1")


def test_pages_are_fetched_only_from_hosts_that_were_named_and_are_public(tmp_path: Path) -> None:
    into = ("--into", str(tmp_path / "web"))
    said = refused("index", "fetch", "https://pages.invalid/a", *into, status=1)
    assert "pages.invalid is not a host that may be asked" in said and "--allow pages.invalid" in said
    said = refused("index", "fetch", "http://localhost/", "file:///etc/passwd", *into, "--allow", "localhost", status=1)
    assert "localhost is at" in said and "not an address of a web page" in said and "2 of 2 pages were not fetched" in said
    said = refused("index", "fetch", "http://localhost/", *into, "--set", "web_hosts=[localhost]", status=1)
    assert "which is not a public address" in said and not (tmp_path / "web").exists()


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused("serve", "smollm2-135m", "--adapter", "none", "--port", port, status=1)


def test_asking_without_a_server_says_how_to_start_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert "make serve" in refused("ask", "Who?", "--port", port, status=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_monitor_leaves_no_prometheus(number: int) -> None:
    command = [sys.executable, "-m", "labs", "monitor"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C stops" in line:
                break
        else:
            assert "make doctor" in "".join(lines)
            pytest.skip("there is no Prometheus on this machine")
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("prometheus" in child.name() for child in children)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_no_space_is_explained_and_nothing_is_lost(tmp_path: Path) -> None:
    """A real full disk: a tiny tmpfs in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = f"mount -t tmpfs -o size=64k none {disk} && exec {sys.executable} -m labs index sync labs/knowledge"
    environment = os.environ | {"LLMLAB_INDEX": str(disk)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inner], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 5 and "no space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("suffix", ["jsonl", *(pytest.param(s, marks=pytest.mark.slow) for s in ("csv", "parquet"))])
def test_the_instruction_set_is_exported(suffix: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    file = tmp_path / f"reader.{suffix}"
    assert llmlab("data", "export", str(file), "--examples", "8").returncode == 0
    kind = {"jsonl": "json"}.get(suffix, suffix)
    rows = load_dataset(kind, data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 8
    assert "tmp.txt" in refused("data", "export", str(tmp_path / "tmp.txt"), status=2)


@pytest.mark.slow
def test_rehearsing_on_request_ends_well_and_mistral_without_weights_ends_with_status_4(tmp_path: Path) -> None:
    done = llmlab("finetune", "mistral-7b", "--rehearse", LLMLAB_RUNS=str(tmp_path))
    assert done.returncode == 0 and "Plan: mistral-7b, qlora" in done.stdout
    message = refused("finetune", "mistral-7b", "--pull", "never", status=4, LLMLAB_RUNS=str(tmp_path))
    assert "mistral-7b was rehearsed, not tuned" in message and "llmlab pull mistral-7b" in message
    assert "rehearsal" in refused("serve", "mistral-7b", status=1, LLMLAB_RUNS=str(tmp_path))
