"""Adapters added and removed over the API while a real llama.cpp streams; what is refused, and that a failure changes nothing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pipelines.runs import Run
from serving import launch
from serving.access import ADMIN_VARIABLE
from serving.launch import Running, running
from tests.serving.conftest import (
    MODEL,
    TUNED,
    FakeEngine,
    descendants,
    environment,
    gone,
    metric,
    serve_config,
    sibling,
    wait_until,
)

KEY = {"Authorization": "Bearer secret"}
CHAT = {"messages": [{"role": "user", "content": "Write the numbers from one to ten."}], "max_tokens": 12, "temperature": 0}


@pytest.fixture
def admin(lab: Running, tuned_run: Run) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        stack.enter_context(environment(**{ADMIN_VARIABLE: "secret", "LLMLAB_RUNS": str(tuned_run.path.parents[2])}))
        yield stack.enter_context(httpx.Client(base_url=lab.url, headers=KEY, trust_env=False, timeout=120))


def test_only_the_admin_sees_and_changes_adapters(http: httpx.Client) -> None:
    with environment(**{ADMIN_VARIABLE: "secret"}):
        for answer in (
            http.get("/v1/adapters"),
            http.post("/v1/adapters", json={"run": "latest"}),
            http.delete("/v1/adapters/x"),
        ):
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_they_are_listed_and_adding_one_again_changes_nothing(admin: httpx.Client, lab: Running, tuned_run: Run) -> None:
    engine = lab.engine_url
    card = {"object": "adapter", "name": TUNED, "run": tuned_run.id, "created": tuned_run.created,
            "fingerprint": tuned_run.fingerprint}  # fmt: skip
    for body in ({"run": "latest"}, {"run": tuned_run.id}, {"run": tuned_run.id, "name": TUNED}):
        answer = admin.post("/v1/adapters", json=body)
        assert answer.status_code == 201 and answer.json() == card
    assert admin.get("/v1/adapters").json() == {"object": "list", "data": [card], "changing": False, "requests_leaving": 0}
    assert lab.engine_url == engine


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "run"),
        ({"run": ""}, 422, "run"),
        ({"run": "../../etc"}, 422, "run"),
        ({"run": "/etc/passwd"}, 422, "run"),
        ({"run": "20200101T000000Z-abcdef12"}, 404, "no run is named"),
        ({"run": "none"}, 422, "no run is named"),
        ({"run": "latest", "name": "../x"}, 422, "name"),
        ({"run": "latest", "name": "a/b"}, 422, "name"),
        ({"run": "latest", "name": "a b=c"}, 422, "name"),
        ({"run": "latest", "name": "x\n"}, 422, "name"),
        ({"run": "latest", "name": ""}, 422, "name"),
        ({"run": "latest", "name": MODEL}, 422, "would name two models"),
        ({"run": "latest", "path": "/tmp"}, 422, "path"),
    ],
)
def test_what_names_no_run_or_no_name_is_refused(admin: httpx.Client, body: dict[str, str], status: int, words: str) -> None:
    answer = admin.post("/v1/adapters", json=body)
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


def test_rehearsals_foreign_and_changed_runs_are_refused(admin: httpx.Client, tuned_run: Run, tmp_path: Path) -> None:
    rehearsal = sibling(tuned_run, tmp_path, seed=1, rehearsal=True)
    foreign = sibling(tuned_run, tmp_path, seed=2, model="mistral-7b")
    changed = sibling(tuned_run, tmp_path, seed=3)
    with (changed.path / "adapter.gguf").open("ab") as stream:
        stream.write(b"x")
    failed = metric(admin, "llmlab_adapter_changes_total", change="add", outcome="failed")
    with environment(LLMLAB_RUNS=str(tmp_path)):
        for run, words in ((rehearsal, "is a rehearsal"), (foreign, "of mistral-7b"), (changed, "adapter.gguf is not the file")):
            answer = admin.post("/v1/adapters", json={"run": run.id, "name": "faq"})
            assert answer.status_code == 409 and words in answer.json()["error"]["message"], answer.text
    assert metric(admin, "llmlab_adapter_changes_total", change="add", outcome="failed") == failed + 3
    assert [card["name"] for card in admin.get("/v1/adapters").json()["data"]] == [TUNED]


def test_only_an_adapter_can_be_removed(admin: httpx.Client) -> None:
    assert admin.delete("/v1/adapters/nobody").status_code == 404
    assert admin.delete("/v1/adapters/..%2f..%2fx").status_code == 404
    assert "is the base" in admin.delete(f"/v1/adapters/{MODEL}").json()["error"]["message"]


class Streams:
    """Clients that stream one chat after the other from the moment of entry, and keep what they got."""

    def __init__(self, url: str, names: list[str]) -> None:
        self.url, self.stop, self.answers, self.problems = (
            url,
            threading.Event(),
            {name: set[str]() for name in names},
            list[str](),
        )
        self.count = dict.fromkeys(names, 0)
        self.threads = [threading.Thread(target=self.run, args=(name,)) for name in names]

    def run(self, name: str) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=120) as client:
            while not self.stop.is_set():
                answer = client.post("/v1/chat/completions", json=CHAT | {"model": name, "stream": True})
                if answer.status_code != 200 or "error" in answer.text or "[DONE]" not in answer.text:
                    self.problems.append(answer.text)
                    return
                chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                self.answers[name].add("".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]))
                self.count[name] += 1

    def __enter__(self) -> Streams:
        for thread in self.threads:
            thread.start()
        return self

    def more(self) -> None:
        """Wait until each client has got two more answers, of which the last began after this was called."""
        before = dict(self.count)
        wait_until(lambda: self.problems or all(self.count[name] >= before[name] + 2 for name in before), 120)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def two_runs(tuned_run: Run, other_run: Run, tmp_path: Path) -> Path:
    """Return a folder with both runs."""
    for run in (tuned_run, other_run):
        shutil.copytree(run.path, tmp_path / "finetune" / MODEL / run.id)
    return tmp_path


@pytest.mark.slow
def test_no_request_is_lost_while_adapters_come_and_go(tuned_run: Run, other_run: Run, two_runs: Path, index_root: Path) -> None:
    values = {ADMIN_VARIABLE: "secret", "LLMLAB_RUNS": str(two_runs), "LLMLAB_INDEX": str(index_root)}
    with ExitStack() as stack:
        stack.enter_context(environment(**values))
        lab = stack.enter_context(running(MODEL, serve_config(), adapter=tuned_run.id, say=lambda _: None))
        admin = stack.enter_context(httpx.Client(base_url=lab.url, headers=KEY, trust_env=False, timeout=120))

        def ask(name: str) -> httpx.Response:
            return admin.post("/v1/chat/completions", json=CHAT | {"model": name})

        first = lab.service.supervisor
        processes = descendants(first._process.pid)
        streams = stack.enter_context(Streams(lab.url, [MODEL, TUNED]))
        streams.more()
        added = admin.post("/v1/adapters", json={"run": other_run.id, "name": "other"})
        assert added.status_code == 201 and added.json()["run"] == other_run.id, added.text
        assert admin.get("/v1/models/other").json()["passport"]["fingerprint"] == other_run.fingerprint
        other = ask("other").json()["choices"][0]["message"]["content"]
        streams.more()
        assert lab.service.supervisor is not first
        wait_until(lambda: not admin.get("/v1/adapters").json()["changing"], 60)
        wait_until(lambda: gone(processes), 30)
        assert not first.launch.work.exists(), "the log of the engine that is gone"
        assert metric(admin, "llmlab_engine_up", engine="llamacpp") == 1
        assert "llamacpp:prompt_tokens_total" in admin.get("/metrics/engine").text
        replaced = admin.post("/v1/adapters", json={"run": other_run.id, "name": TUNED})
        assert replaced.status_code == 201, replaced.text
        assert ask(TUNED).json()["choices"][0]["message"]["content"] == other
        assert admin.delete("/v1/adapters/other").status_code == 200
        assert ask("other").status_code == 404 and ask(TUNED).status_code == 200
        streams.more()
        assert streams.problems == [] and len(streams.answers[MODEL]) == 1 and len(streams.answers[TUNED]) == 2
        assert other in streams.answers[TUNED] and not streams.answers[TUNED] & streams.answers[MODEL]
        last = descendants(lab.service.supervisor._process.pid)
        wait_until(lambda: not admin.get("/v1/adapters").json()["changing"], 60)
    assert gone(last)


def test_an_engine_that_does_not_start_changes_nothing(tmp_path: Path, tuned_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("well")
    monkeypatch.setattr(launch.engines, "named", lambda _: engine)
    monkeypatch.setattr(launch, "WORK", tmp_path)
    with ExitStack() as stack:
        values = {ADMIN_VARIABLE: "secret", "LLMLAB_RUNS": str(tuned_run.path.parents[2]), "LLMLAB_INDEX": str(tmp_path / "none")}
        stack.enter_context(environment(**values))
        lab = stack.enter_context(running(MODEL, serve_config(), adapter="none", say=lambda _: None))
        admin = stack.enter_context(httpx.Client(base_url=lab.url, headers=KEY, trust_env=False, timeout=60))
        serving, engine.behaviour = lab.service.supervisor, "dies"
        answer = admin.post("/v1/adapters", json={"run": "latest"})
        assert answer.status_code == 502 and "nothing was changed" in answer.json()["error"]["message"]
        assert "cannot open the model" in answer.json()["error"]["message"]
        assert lab.service.supervisor is serving and admin.get("/readyz").status_code == 200
        assert admin.get("/v1/adapters").json()["data"] == []
        assert metric(admin, "llmlab_engine_up", engine="llamacpp") == 1
