"""The adapter as GGUF in llama.cpp against the same adapter as PEFT in transformers: the same base, two implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines import catalogue
from pipelines.evaluate.reader import generate, load_tuned
from pipelines.rag.answer import messages
from pipelines.runs import Run
from pipelines.tune.data import Page
from serving import engines
from serving.address import check_free
from serving.engines.contract import Launch
from serving.settings import load_serve_config
from serving.supervisor import Supervisor
from serving.tuned import adapter_of
from tests.conftest import MODEL

PAGES = (
    Page("vela", "Vela > Origin", "Vela was developed by Orion Labs and launched in March 2021 under the MIT licence."),
    Page("kite", "Kite > Context", "Kite reads 64K tokens and has 9B parameters. It was built for legal documents."),
)
GOLDEN = [
    messages(question, PAGES)
    for question in (
        "Who developed Vela?", "When was Vela launched?", "What licence does Vela have?", "How many tokens can Kite take?",
        "How many parameters does Kite have?", "What is Kite used for?",
    )
]  # fmt: skip
MAX_LOGPROB_DIFFERENCE = 0.5  # nats; llama.cpp multiplies 4-bit weights with activations rounded to 8 bits


@pytest.fixture(scope="module")
def engine(tuned_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    llamacpp = engines.named("llamacpp")
    base = llamacpp.base_path(catalogue.runnable(MODEL), False, print)
    port = check_free("127.0.0.1", 0, "")
    work: Path = tmp_path_factory.mktemp("work")
    launch = Launch(MODEL, base, (adapter_of(tuned_run, MODEL),), "127.0.0.1", port, 1024, 1, 2, False, work)
    supervisor = Supervisor(llamacpp, launch, 120.0, load_serve_config().restart)
    supervisor.spawn()
    try:
        supervisor.await_health()
        yield supervisor
    finally:
        supervisor.stop()


@pytest.fixture(scope="module")
def reference(tuned_run: Run) -> tuple[Any, Any]:
    loaded = load_tuned(tuned_run)
    return loaded.tuned, loaded.tokenizer


def ask(engine: Supervisor, chat: list[dict[str, str]], name: str) -> dict[str, Any]:
    body = {"model": name, "messages": chat, "temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 3}
    answer = httpx.post(f"{engine.launch.url}/v1/chat/completions", json=engine.engine.select(body, engine.launch), timeout=120)
    content: dict[str, Any] = answer.raise_for_status().json()["choices"][0]
    return content


def test_both_give_the_same_greedy_answers(engine: Supervisor, reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    expected = [text.strip() for text in generate(model, tokenizer, GOLDEN, lambda _: None)]
    found = [ask(engine, chat, f"{MODEL}-tuned")["message"]["content"].strip() for chat in GOLDEN]
    assert found == expected
    assert sum(text.endswith(("[1]", "[2]")) or "do not answer" in text for text in found) >= 5  # as it was taught
    with model.disable_adapter():
        untuned = generate(model, tokenizer, GOLDEN[:2], lambda _: None)
    assert [u.strip() for u in untuned] != found[:2]


def test_the_first_logits_agree(engine: Supervisor, reference: tuple[Any, Any], report_figure: Callable[[str], None]) -> None:
    import torch

    model, tokenizer = reference
    worst = 0.0
    for name, adapted in ((f"{MODEL}-tuned", True), (MODEL, False)):
        for chat in GOLDEN:
            top = ask(engine, chat, name)["logprobs"]["content"][0]["top_logprobs"][0]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
                "input_ids"
            ]
            with torch.inference_mode():
                if adapted:
                    logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1]
                else:
                    with model.disable_adapter():
                        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1]
            worst = max(worst, abs(float(torch.log_softmax(logits.float(), -1)[top["id"]]) - top["logprob"]))
    report_figure(f"GGUF against PEFT, worst difference of the first token's log-probability: {worst:.3f} nats")
    assert worst < MAX_LOGPROB_DIFFERENCE
