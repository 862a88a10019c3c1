"""What the monitoring tests share: how a PromQL expression is taken apart, and what the rules' files hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import promql_parser
import pytest
import yaml

from monitoring import metrics
from monitoring.prometheus_server import CONFIG

# What Prometheus itself and the client library give.
BUILT_IN = {
    "up", "ALERTS", "scrape_duration_seconds", "scrape_samples_scraped", "process_resident_memory_bytes",
    "process_cpu_seconds_total", "process_open_fds", "process_max_fds",
}  # fmt: skip
# Of the engines: llama.cpp's as its /metrics has them (tests/serving/test_watching.py reads them), vLLM's as its documentation
# lists them, the older names too.
ENGINE_NAMES = {
    "llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total", "llamacpp:tokens_predicted_total",
    "llamacpp:prompt_seconds_total", "llamacpp:tokens_predicted_seconds_total", "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
    *(f"vllm:{name}_{part}" for part in ("bucket", "sum") for name in (
        "e2e_request_latency_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
        "time_to_first_token_seconds")),
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum", "vllm:request_max_num_generation_tokens_sum",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
}  # fmt: skip


@pytest.fixture(scope="session")
def selected_names() -> Callable[[str], set[str]]:
    """Parse an expression and return the names of the series that it selects."""

    def parse(expr: str) -> set[str]:
        names: set[str] = set()

        def visit(node: Any) -> bool:
            if isinstance(node, promql_parser.VectorSelector):
                assert node.name, f"a selector without a metric name in {expr}"
                names.add(node.name)
            return True

        promql_parser.walk(promql_parser.parse(expr), visit)
        return names

    return parse


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """Return every recording and alerting rule."""
    names = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["rule_files"]
    loaded = [yaml.safe_load((CONFIG.parent / name).read_text(encoding="utf-8")) for name in names]
    return [rule for content in loaded for group in content["groups"] for rule in group["rules"]]


@pytest.fixture(scope="session")
def known_names(rules: list[dict[str, Any]]) -> set[str]:
    """Return the names of all series that an expression may use."""
    recorded = {rule["record"] for rule in rules if "record" in rule}
    return set().union(*metrics.series_names().values()) | recorded | BUILT_IN
