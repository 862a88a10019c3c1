"""The declared metrics: names, units, bounded labels, and that every one is plotted or alerted on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import metrics
from monitoring.dashboards.boards import BOARDS


def exported() -> set[str]:
    return set().union(*metrics.series_names().values())


def sample(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(name, labels)


def test_series_names_are_those_that_prometheus_reads() -> None:
    families = text_string_to_metric_families(generate_latest(metrics.REGISTRY).decode())
    read = {sample.name for family in families for sample in family.samples}
    read = {name for name in read if name.startswith(metrics.PREFIX)}
    assert {"llmlab_rag_hits_bucket", "llmlab_rag_citations_total", "llmlab_index_chunks"} <= read
    assert read <= exported()


def test_process_metrics_are_exported() -> None:
    assert b"python_info" in generate_latest(metrics.REGISTRY)
    assert b"process_resident_memory_bytes" in generate_latest(metrics.TRAINING)


def test_every_declared_metric_is_plotted_or_alerted(
    selected_names: Callable[[str], set[str]], rules: list[dict[str, Any]]
) -> None:
    used = set().union(*(selected_names(expr) for board in BOARDS for _, expr in board.expressions()))
    used |= set().union(*(selected_names(rule["expr"]) for rule in rules))
    unused = [metric for metric, series in metrics.series_names().items() if not series & used]
    assert unused == []


def test_units_are_base_units() -> None:
    wrong = ("_ms", "_milliseconds", "_minutes", "_mb", "_kb", "_percent")
    assert not [name for name in exported() if any(f"{part}_" in f"{name}_" for part in wrong)]


def test_histogram_buckets_rise() -> None:
    histograms = [metric for metric in vars(metrics).values() if isinstance(metric, Histogram)]
    assert len(histograms) == 13
    for histogram in histograms:
        assert list(histogram._upper_bounds) == sorted(set(histogram._upper_bounds))


@pytest.mark.parametrize(("value", "label"), [("smollm2-135m", "smollm2-135m"), ("../../etc/passwd", "other"), ("", "other")])
def test_bounded_replaces_what_is_not_allowed(value: str, label: str) -> None:
    assert metrics.bounded(value, {"smollm2-135m"}) == label


def test_fixed_label_sets_start_at_zero_or_more() -> None:
    for outcome in metrics.RAG_OUTCOMES:
        assert sample("llmlab_rag_requests_total", outcome=outcome) is not None
    for valid in metrics.CITATION_VALIDITY:
        assert sample("llmlab_rag_citations_total", valid=valid) is not None


def test_start_series_creates_every_outcome_of_a_model() -> None:
    metrics.start_series(["start-series"])
    for model in ("start-series", "other"):
        for outcome in metrics.GENERATION_OUTCOMES:
            assert sample("llmlab_generation_requests_total", model=model, outcome=outcome) is not None
    assert sample("llmlab_generated_tokens_total", model="start-series") == 0


def test_set_engine_forgets_the_earlier_choice() -> None:
    metrics.set_engine("vllm", "a GPU is present and vLLM is installed", 64)
    metrics.set_engine("llamacpp", "no GPU is present", 4)
    assert sample("llmlab_engine_info", engine="llamacpp", reason="no GPU is present") == 1
    assert sample("llmlab_engine_up", engine="llamacpp") == 0
    assert sample("llmlab_engine_up", engine="vllm") is None


def test_set_build_forgets_the_earlier_version() -> None:
    metrics.set_build("0.1.0")
    metrics.set_build("0.2.0")
    assert sample("llmlab_build_info", version="0.2.0") == 1
    assert sample("llmlab_build_info", version="0.1.0") is None
