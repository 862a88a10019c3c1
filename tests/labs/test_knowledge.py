from __future__ import annotations

import pytest

from pipelines.catalogue import Model, document_rows
from pipelines.tune.data import KNOWLEDGE

SECTION = {
    "developer": "Origin and licence", "launch": "Origin and licence", "license": "Origin and licence",
    "context_window": "Context and capacity", "parameters": "Context and capacity", "architecture": "Context and capacity",
    "key_features": "Strengths and uses", "use_cases": "Strengths and uses", "hands_on": "Getting hands on",
    "accuracy": "Price and speed", "input_price": "Price and speed", "output_price": "Price and speed",
    "latency": "Price and speed", "throughput": "Price and speed",
}  # fmt: skip


def sections(name: str) -> dict[str, str]:
    parts = (KNOWLEDGE / f"{name}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return {title.strip(): " ".join(text.split()) for title, _, text in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("model", document_rows(), ids=lambda m: m.name)
def test_a_page_states_every_fact_of_its_model(model: Model) -> None:
    page = sections(model.name)
    for key, fact in model.facts.items():
        text = page[SECTION[key]]
        assert model.title in text
        for statement in filter(None, (fact.document, fact.maker)):
            assert statement in text, f"{key}: {statement!r}"
        if fact.document and fact.maker:
            assert "document" in text and "maker" in text, f"{key} does not say who says what"


def test_there_is_a_page_for_every_model_and_for_the_techniques() -> None:
    pages = {p.stem for p in KNOWLEDGE.glob("*.md")}
    assert {m.name for m in document_rows()} <= pages
    assert {"lora", "qlora", "dpo", "rag", "vllm", "onnx", "tensorrt", "pruning", "fairlearn", "prometheus", "grafana"} <= pages
    assert len(pages) == 66


def test_pages_are_short_and_plain() -> None:
    for path in KNOWLEDGE.glob("*.md"):
        for title, text in sections(path.stem).items():
            assert 20 <= len(text.split()) <= 75, f"{path.name}, {title}"
