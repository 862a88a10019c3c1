"""The places at the engine: who runs, who waits, who is refused, and that each place comes back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.access import Access
from serving.admission import Admission, Need, need_of
from serving.choices import apart
from serving.launch import Running
from serving.problems import Overloaded
from serving.rates import Rates
from serving.settings import AdmissionBounds
from serving.visit import VISIT, Visit
from tests.serving.conftest import MODEL, TUNED, fake_service, metric, wait_until

ONE = Need(1, 10, 10)


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4} | more


def places(running: int = 2, queued: int | None = None, tokens: int = 1000, wait_seconds: float = 5.0,
           clock: Callable[[], float] = time.monotonic) -> Admission:  # fmt: skip
    return Admission(AdmissionBounds(running=running, queued=queued, queued_tokens=tokens, wait_seconds=wait_seconds), 4, clock)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def enter(admission: Admission, need: Need = ONE) -> Visit:
    visit = Visit(Access(None, "127.0.0.1", Rates(Path("unused"))))
    VISIT.set(visit)
    await admission.enter(need)
    return visit


async def start(admission: Admission, need: Need = ONE) -> asyncio.Task[Visit]:
    task = asyncio.create_task(enter(admission, need))
    await asyncio.sleep(0)
    return task


@pytest.mark.anyio
async def test_those_who_wait_come_in_turn_and_each_place_comes_back() -> None:
    admission = places(running=2)
    first, second = await enter(admission), await enter(admission)
    third, fourth = await start(admission), await start(admission, Need(2, 10, 10))
    with pytest.raises(Overloaded, match="2 generations run and 2 wait"):
        await enter(admission)
    first.leave()
    first.leave()
    assert (await third).prompt_tokens == 10 and not fourth.done()
    second.leave()
    await asyncio.sleep(0)
    assert not fourth.done(), "it needs both places"
    fifth = await start(admission)
    third.result().leave()
    last = await fourth
    assert not fifth.done(), "it does not overtake"
    last.leave()
    (await fifth).leave()
    assert not admission._running and not admission._waiting


@pytest.mark.anyio
async def test_who_leaves_while_waiting_leaves_no_place_behind() -> None:
    admission = places(running=1, queued=3)
    first = await enter(admission)
    left, granted, stays = await start(admission), await start(admission), await start(admission)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    visits = list(admission._waiting)
    first.leave()
    granted.cancel()  # at the very moment at which it is let in
    await asyncio.gather(granted, return_exceptions=True)
    assert granted.cancelled() and not stays.done()
    visits[0].visit.leave()  # as serving.edge does, whatever happened
    (await stays).leave()
    assert not admission._running and not admission._waiting


@pytest.mark.anyio
async def test_waiting_prompts_are_bounded_by_their_tokens() -> None:
    admission = places(running=1, queued=10, tokens=100)
    first = await enter(admission, Need(1, 5000, 10))
    waiting = await start(admission, Need(1, 90, 10))
    with pytest.raises(Overloaded, match="100") as caught:
        await enter(admission, Need(1, 11, 10))
    assert caught.value.kind == "tokens"
    first.leave()
    (await waiting).leave()


@pytest.mark.anyio
async def test_a_wait_that_would_be_too_long_is_refused_at_once_with_the_time_it_takes() -> None:
    now = [0.0]
    admission = places(running=2, queued=50, wait_seconds=10.0, clock=lambda: now[0])
    first, second = await enter(admission), await enter(admission)
    now[0] = 8.0
    first.leave()  # so a generation takes 8 s
    await enter(admission)
    now[0] = 10.0
    assert admission._expected(list(admission._running)[0]) <= 6.0
    waiting = [await start(admission) for _ in range(2)]
    assert not any(task.done() for task in waiting)
    with pytest.raises(Overloaded, match="it would wait for about") as caught:
        await enter(admission)
    assert 10 < caught.value.retry_after_seconds <= 16
    second.leave()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.anyio
async def test_a_prediction_that_was_wrong_does_not_keep_anybody_for_ever() -> None:
    admission = places(running=1, wait_seconds=0.02)
    first = await enter(admission)
    with pytest.raises(Overloaded, match=r"no room for 0\.06 s"):
        await enter(admission)
    first.leave()
    (await enter(admission)).leave()


def test_what_a_chat_needs() -> None:
    need = need_of(apart(chat("word " * 400, n=3, max_tokens=7)))
    assert (need.sequences, need.reply_tokens) == (3, 7) and 3 * 450 < need.prompt_tokens < 3 * 600
    assert need_of([chat("\ud800")]).prompt_tokens > 0
    texts = need_of(apart({"max_tokens": 2}, [[1, 2, 3], "four"]))
    assert texts.sequences == 2 and 3 < texts.prompt_tokens < 20


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[httpx.Client]:
    """A gateway with one place, a queue of one, and an engine that can be told to hang."""
    with fake_service(tmp_path, "admission.running=1", "admission.queued=1", "drain_seconds=0") as client:
        yield client


def test_over_the_bounds_it_is_429_at_once_and_a_client_that_leaves_gives_its_place_back(hanging: httpx.Client) -> None:
    def leave_after(seconds: float) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{hanging.base_url}/v1/chat/completions", json=chat("hang"), timeout=seconds, trust_env=False)

    threads = [threading.Thread(target=leave_after, args=(1.2,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: (metric(hanging, "llmlab_admission_running"), metric(hanging, "llmlab_admission_waiting")) == (1, 1), 5)
    refused = metric(hanging, "llmlab_admission_refused_total", reason="queue")
    for stream in (False, True):
        began = time.perf_counter()
        answer = hanging.post("/v1/chat/completions", json=chat("x", stream=stream))
        seconds = time.perf_counter() - began
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1 and seconds < 0.5
        assert {k: answer.json()["error"][k] for k in ("type", "code")} == {"type": "requests", "code": "server_overloaded"}
    assert metric(hanging, "llmlab_admission_refused_total", reason="queue") == refused + 2
    for thread in threads:
        thread.join()
    wait_until(lambda: metric(hanging, "llmlab_admission_running") + metric(hanging, "llmlab_admission_waiting") == 0, 5)


@pytest.mark.slow
def test_aborted_requests_of_every_kind_leak_no_place(lab: Running, http: httpx.Client) -> None:
    def abort(number: int) -> None:
        asks: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", chat("Count to a thousand.", max_tokens=200, stream=bool(number % 2), ignore_eos=True)),
            ("/v1/rag/query", {"question": "Who made Vela?", "stream": bool(number % 2), "max_tokens": 200, "model": TUNED}),
        ]
        path, body = asks[number // 2 % 2]
        try:
            with httpx.stream("POST", lab.url + path, json=body, timeout=0.02 + 0.02 * number, trust_env=False) as answer:
                if number % 3:
                    next(answer.iter_raw(), None)
        except httpx.TimeoutException:
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(abort, range(24)))
    wait_until(lambda: not lab.service.admission._running and not lab.service.admission._waiting, 20)
    assert http.post("/v1/chat/completions", json=chat("x")).status_code == 200
    assert metric(http, "llmlab_admission_running") == 0 and not lab.service.admission._running


@pytest.mark.slow
def test_a_flood_is_answered_or_refused_and_nothing_else(lab: Running, http: httpx.Client) -> None:
    """Sixty clients at two slots: some answers, the rest 429; the engine never had more than its slots."""

    def ask(number: int) -> tuple[int, float]:
        body = chat("Count to ten.", max_tokens=16, stream=bool(number % 2))
        began = time.perf_counter()
        answer = httpx.post(f"{lab.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        return answer.status_code, time.perf_counter() - began

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    wait_until(lambda: not lab.service.admission._running, 20)
    assert http.get("/readyz").status_code == 200 and json.loads(http.get("/healthz").text) == {"status": "ok"}
