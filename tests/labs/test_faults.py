"""The fault lab: every fault shows on the panel that it names and not in a healthy stack; grades and hints tell what is so."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from labs.cli import app
from labs.faults import lesson
from labs.faults.sandbox import MODEL, Sandbox
from labs.faults.table import FAULTS, Fault, find
from monitoring.child_server import ProgramMissing
from monitoring.dashboards.boards import BOARDS
from monitoring.prometheus_server import find_prometheus
from monitoring.queries import now
from pipelines.config import ROOT
from pipelines.errors import ConfigError, UnknownName

ALERTS = ROOT / "monitoring" / "prometheus" / "alerts.yml"
AT_ONCE = ("LlmlabEngineDown", "LlmlabIndexStale")  # whose expression holds at once; the others look back for minutes
# A deployment of the fault stays, so it comes last; the engine that was killed again and again is healed by the next one.
LIVE = ("poisoned-document", "stale-index", "renamed-metric", "wrong-embedder", "dead-engine")
TRAINED = "end-of-turn-never-supervised"  # for minutes
DEPLOYED = ("wrong-chat-template", "unbounded-queue", TRAINED)
SELDOM = (TRAINED, "renamed-metric")  # in make test-bench; the others in every long check


def test_the_table_is_whole() -> None:
    assert len(FAULTS) >= 8 and {fault.name for fault in FAULTS} == {*LIVE, *DEPLOYED}
    panels = {(board.name, plot.title) for board in BOARDS for plot in board.plots}
    for fault in FAULTS:
        assert (fault.sign.board, fault.sign.panel) in panels
        assert len(set(fault.hints)) == 3
        if fault.sign.alert:
            assert (ROOT / "monitoring" / "runbooks" / f"{fault.sign.alert}.md").is_file()
        words = fault.name.split("-")
        assert not any(all(word in hint.lower() for word in words) for hint in fault.hints[:2]), "hints do not give the name away"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Keep a state as if a sandbox ran, without a Prometheus that answers."""
    monkeypatch.setattr(lesson, "STATE", tmp_path / "lab.json")

    def plant(name: str) -> None:
        answer = lesson._hash("salt", name)
        url = "http://127.0.0.1:9"
        state = lesson.State(pid=os.getpid(), salt="salt", answer=answer, hints=0, prometheus=url, gateway=url)
        (tmp_path / "lab.json").write_text(state.model_dump_json(), encoding="utf-8")

    return plant


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["break", *arguments])
    return done.exit_code, done.output


def test_hints_grow_and_the_file_tells_no_name(planted: Callable[[str], None]) -> None:
    planted("dead-engine")
    assert "dead" not in lesson.STATE.read_text(encoding="utf-8")
    told = [run("--hint")[1] for _ in range(4)]
    assert all(f"hint {number} of 3" in text for number, text in zip((1, 2, 3, 3), told, strict=True))


def test_without_a_sandbox_there_is_nothing_to_grade(planted: Callable[[str], None]) -> None:
    for words in (["--hint"], ["--check", "dead-engine"]):
        status, text = run(*words)
        assert status == 2 and "llmlab break random" in text and "Traceback" not in text
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    planted("dead-engine")
    text = lesson.STATE.read_text(encoding="utf-8").replace(f":{os.getpid()},", f":{gone.pid},")
    lesson.STATE.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing is broken"):
        lesson.hint()


def test_wrong_names_and_options_are_refused(planted: Callable[[str], None]) -> None:
    planted("dead-engine")
    with pytest.raises(UnknownName, match="dead-engin"):
        lesson.check("dead-engin", None)
    with pytest.raises(UnknownName, match="Engine on"):
        lesson.check("dead-engine", "Engine on")
    with pytest.raises(ConfigError, match="already"):
        lesson.run("dead-engine", lambda _: None)
    assert run("dead-engine", "--hint")[0] == 2 and run("--panel", "Engine up")[0] == 2
    status, text = run()
    assert status == 0 and all(fault.name in text for fault in FAULTS)
    status, text = run("--check", "dead-engine")
    assert status == 1 and "no Prometheus answers" in text and "Traceback" not in text


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One healthy stack with traffic, in which one fault after the other is planted."""
    try:
        find_prometheus()
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    with Sandbox(lambda _: None) as stack:
        folder = stack.folder
        wait_for(lambda: now(stack.prometheus_url, "sum(increase(llmlab_rag_requests_total[30s])) > 3"))
        yield stack
    assert not folder.exists()


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.3)


def firing(sandbox: Sandbox, alert: str) -> bool:
    content = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    expr = next(rule["expr"] for group in content["groups"] for rule in group["rules"] if rule["alert"] == alert)
    return bool(now(sandbox.prometheus_url, expr))


def keep(fault: Fault, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(lesson, "STATE", folder / "lab.json")
    lesson._keep(fault, sandbox)


@pytest.mark.timeout(900)  # the first one starts the stack, and one trains; on a machine that others use too
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.campaign if name in SELDOM else pytest.mark.slow) for name in (*LIVE, *DEPLOYED)],
)
def test_a_fault_shows_on_its_panel_and_only_then(
    name: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fault, url = find(name), sandbox.prometheus_url
    if name in DEPLOYED[:1]:
        sandbox.deploy()  # the engine before was killed many times
        wait_for(lambda: not fault.sign.seen(fault.sign.shown(url)))
    assert not fault.sign.seen(fault.sign.shown(url)) or name in DEPLOYED[1:], "it shows in a healthy stack"
    assert name not in LIVE or not (fault.sign.alert in AT_ONCE and firing(sandbox, str(fault.sign.alert)))
    keep(fault, sandbox, monkeypatch, tmp_path)
    with fault.plant(sandbox):
        wait_for(lambda: fault.sign.seen(fault.sign.shown(url)))
        if fault.sign.model != ".*":
            base = dataclasses.replace(fault.sign, model=MODEL)
            assert base.shown(url) and not base.seen(base.shown(url)), "the base does as before"
        if fault.sign.alert in AT_ONCE:
            wait_for(lambda: firing(sandbox, str(fault.sign.alert)))
        check_grades(fault)
    if name in LIVE[:-1]:
        wait_for(lambda: not fault.sign.seen(fault.sign.shown(url)))


def check_grades(fault: Fault) -> None:
    status, text = run("--check", fault.name, "--panel", fault.sign.panel)
    assert status == 0 and fault.what in text and fault.sign.says in text
    assert run("--check", fault.name, "--panel", "Index age")[0] == 1
    other = next(each for each in FAULTS if each is not fault)
    status, text = run("--check", other.name)
    assert status == 1 and fault.name not in text and fault.what not in text


@pytest.mark.slow
def test_the_command_leaves_nothing_behind(tmp_path: Path) -> None:
    """From start to Ctrl-C, as a learner sees it."""
    try:
        find_prometheus()
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "COLUMNS": "300"}
    script = (
        "import labs.faults.lesson as lesson; lesson.HEALTHY_SECONDS = 1; from labs.cli import main; main(['break', 'random'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C ends everything" in line:
            break
    told = "".join(lines)
    assert "something is broken now" in told and not any(fault.name in told or fault.what in told for fault in FAULTS), told
    children = psutil.Process(process.pid).children(recursive=True)
    gateway = next(line.split()[1] for line in lines if line.startswith("gateway"))
    assert gateway.startswith("http://127.0.0.1:") and httpx.get(gateway, trust_env=False).status_code == 200
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "nothing of it is left" in rest
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children) and not list(tmp_path.glob("llmlab-break-*"))
    assert not lesson.STATE.exists()
