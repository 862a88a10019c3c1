"""The gateway's pages, and that every declared metric is really set by it."""

from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import series_names
from serving.launch import Running
from tests.serving.conftest import MODEL, PAGES, POISONED, TUNED, fake_service, metric


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
    assert metric(http, "llmlab_http_requests_in_flight") == 1, "this very request"


def test_every_declared_metric_is_exposed_with_a_series(http: httpx.Client) -> None:
    http.post("/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 2}).raise_for_status()
    families = text_string_to_metric_families(http.get("/metrics").text)
    exposed = {sample.name for family in families for sample in family.samples}
    of_trainings = "llmlab_training_"  # which the process of a training serves: tests/labs/test_metered.py
    names = [name for names in series_names().values() for name in names if not name.startswith(of_trainings)]
    missing = [name for name in names if name not in exposed]
    assert missing == []


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
