"""The gateway's pages, and that every declared metric is really set by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from labs.bench.watch import MOST_CPU_SHARE, MOST_SCRAPE_SECONDS, MOST_SERIES, bench_watch, series, strangers
from monitoring.metrics import series_names
from pipelines import catalogue
from serving.launch import Running
from serving.prices import price_of
from serving.settings import Prices
from tests.serving.conftest import MODEL, PAGES, POISONED, TUNED, fake_service, metric, wait_until


def test_requests_move_the_metrics(http: httpx.Client) -> None:
    watched = {
        "llmlab_http_requests_total": {"route": "/v1/rag/query", "method": "POST", "status": "200"},
        "llmlab_http_request_duration_seconds_count": {"route": "/v1/rag/query"},
        "llmlab_generation_requests_total": {"model": TUNED, "outcome": "ok"},
        "llmlab_generation_ttft_seconds_count": {"model": TUNED},
        "llmlab_generation_duration_seconds_count": {"model": TUNED},
        "llmlab_prompt_tokens_total": {"model": TUNED},
        "llmlab_generated_tokens_total": {"model": TUNED},
        "llmlab_rag_requests_total": {},
        "llmlab_rag_stage_duration_seconds_count": {"stage": "prompt"},
        "llmlab_rag_hits_count": {},
        "llmlab_rag_duration_seconds_count": {},
        "llmlab_rag_context_tokens_count": {},
        "llmlab_generation_prompt_tokens_count": {"model": TUNED},
        "llmlab_generation_reply_tokens_count": {"model": TUNED},
        "llmlab_rag_top_score_count": {},
    }
    before = {name: metric(http, name, **labels) for name, labels in watched.items()}
    answer = http.post("/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 6}).json()
    moved = {name: metric(http, name, **labels) - before[name] for name, labels in watched.items()}
    assert moved.pop("llmlab_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert moved.pop("llmlab_generated_tokens_total") == answer["usage"]["completion_tokens"]
    assert set(moved.values()) == {1}, moved


def test_gauges_tell_the_state_of_the_newest_service(tmp_path: Path, index_root: Path) -> None:
    with fake_service(tmp_path, index=index_root) as client:
        check_gauges(client)


def check_gauges(http: httpx.Client) -> None:
    assert metric(http, "llmlab_engine_up", engine="llamacpp") == 1
    assert metric(http, "llmlab_engine_info", engine="llamacpp", reason="asked for by name") == 1
    assert metric(http, "llmlab_index_chunks") == len(PAGES) + len(POISONED)
    assert metric(http, "llmlab_index_created_timestamp_seconds") > 1.7e9
    assert metric(http, "llmlab_build_info") == 1
    assert metric(http, "llmlab_index_info", embedder="minilm") == 1
    assert metric(http, "llmlab_engine_slots", engine="llamacpp") == 2
    assert metric(http, "llmlab_machine_memory_available_bytes") > 1e8
    for folder in ("cache", "index", "runs"):
        assert 0 < metric(http, "llmlab_disk_free_bytes", folder=folder) < metric(http, "llmlab_disk_size_bytes", folder=folder)
    assert metric(http, "llmlab_http_requests_in_flight") == 1, "this very request"


def test_every_declared_metric_is_exposed_with_a_series(http: httpx.Client) -> None:
    http.post("/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 2}).raise_for_status()
    families = text_string_to_metric_families(http.get("/metrics").text)
    exposed = {sample.name for family in families for sample in family.samples}
    # a training serves the figures of trainings (tests/labs/test_metered.py); those of GPUs are absent without one
    elsewhere = ("llmlab_training_", "llmlab_gpu_")
    names = [name for names in series_names().values() for name in names if not name.startswith(elsewhere)]
    missing = [name for name in names if name not in exposed]
    assert missing == []


def test_strangers_make_a_bounded_number_of_series(lab: Running) -> None:
    asyncio.run(strangers(lab.url, 150))
    before = series(lab.url)
    asyncio.run(strangers(lab.url, 150, seed=1))
    assert series(lab.url) - before < 60 and series(lab.url) <= MOST_SERIES  # only statuses and methods that were not met before


@pytest.mark.campaign
def test_the_cost_of_watching_after_ten_thousand_requests(report_figure: Callable[[str], None]) -> None:
    document = bench_watch(10_000)
    report_figure(f"bench watch: {document}")
    assert document["series_after"] <= MOST_SERIES
    assert document["scrape_p50_seconds"] < MOST_SCRAPE_SECONDS and document["cpu_share_of_a_core"] < MOST_CPU_SHARE


def test_times_between_tokens_and_costs_are_counted(http: httpx.Client) -> None:
    names = ("llmlab_generation_inter_token_seconds_count", "llmlab_generated_tokens_total", "llmlab_prompt_tokens_total")
    before = [metric(http, name, model=MODEL) for name in names]
    dollars = {kind: metric(http, "llmlab_cost_dollars_total", model=MODEL, kind=kind) for kind in ("prompt", "reply")}
    messages = [{"role": "user", "content": "Write the numbers from one to twenty."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 6, "stream": True, "temperature": 0}
    http.post("/v1/chat/completions", json=body).raise_for_status()
    gaps, reply, prompt = (metric(http, name, model=MODEL) - was for name, was in zip(names, before, strict=True))
    assert gaps == 5 and reply == 6 and prompt > 5
    spent = {kind: metric(http, "llmlab_cost_dollars_total", model=MODEL, kind=kind) - was for kind, was in dollars.items()}
    assert spent == pytest.approx({"prompt": prompt * 0.05 / 1e6, "reply": reply * 0.2 / 1e6})


def test_a_stream_that_is_left_costs_what_was_read_and_written(http: httpx.Client) -> None:
    def state() -> dict[str, float]:
        found = {kind: metric(http, "llmlab_cost_dollars_total", model=MODEL, kind=kind) for kind in ("prompt", "reply")}
        return found | {
            "tokens": metric(http, "llmlab_generated_tokens_total", model=MODEL),
            "left": metric(http, "llmlab_generation_requests_total", model=MODEL, outcome="cancelled"),
            "none": metric(http, "llmlab_generation_finished_total", model=MODEL, reason="none"),
        }

    before = state()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(8):
            next(lines)
    wait_until(lambda: state()["left"] == before["left"] + 1)
    moved = {name: value - before[name] for name, value in state().items()}
    assert moved["none"] == 1 and 3 <= moved["tokens"] < 400
    assert moved["reply"] == pytest.approx(moved["tokens"] * 0.2 / 1e6) and moved["prompt"] > 0


def test_prices_are_the_configurations_else_the_catalogues() -> None:
    known, unknown = catalogue.find("gpt-4o"), catalogue.find(MODEL)
    nothing = Prices(prompt=None, reply=None)
    assert price_of(known, nothing) == (2.5, 10.0)
    assert price_of(known, Prices(prompt=None, reply=1.0)) == (2.5, 1.0)
    assert price_of(unknown, nothing) == (None, None)


def test_a_client_cannot_make_series(http: httpx.Client) -> None:
    http.get("/wp-login.php")
    http.request("BREW", "/healthz")
    http.post("/v1/chat/completions", json={"model": "invented", "messages": [{"role": "user", "content": "x"}]})
    exposed = http.get("/metrics").text
    assert "wp-login" not in exposed and "BREW" not in exposed and "invented" not in exposed
    assert metric(http, "llmlab_http_requests_total", route="unmatched", status="404") >= 1


def test_a_plain_completion_has_no_time_to_first_token(http: httpx.Client) -> None:
    before = metric(http, "llmlab_generation_ttft_seconds_count", model=MODEL)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    http.post("/v1/chat/completions", json=body).raise_for_status()
    assert metric(http, "llmlab_generation_ttft_seconds_count", model=MODEL) == before
    http.post("/v1/chat/completions", json=body | {"stream": True}).raise_for_status()
    assert metric(http, "llmlab_generation_ttft_seconds_count", model=MODEL) == before + 1


def test_pages(http: httpx.Client, lab: Running, said: list[str]) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json()["status"] == "ready"
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/rag/query", "/healthz", "/readyz", "/metrics"} <= set(paths)
    assert any("llamacpp: asked for by name" in line for line in said)
    assert any(lab.url in line for line in said) and any("adapter" in line for line in said)


def test_an_unknown_path_and_a_wrong_method(http: httpx.Client) -> None:
    assert http.get("/nowhere").json()["error"]["expected"] == "a path and method shown at /docs"
    assert http.get("/v1/rag/query").status_code == 405
    assert http.delete("/v1/models").json()["error"]["type"] == "invalid_request_error"
