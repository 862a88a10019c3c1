"""vLLM behind the same gateway: base and adapter through the OpenAI client, and a question to the index."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.hardware import VLLM_PYTHON
from pipelines.runs import Run
from serving.access import ADMIN_VARIABLE
from serving.launch import Running, running
from tests.monitoring.conftest import ENGINE_NAMES
from tests.serving.conftest import MODEL, TUNED, environment, serve_config, wait_until

CHAT = [{"role": "user", "content": "Write the numbers from one to ten."}]


def check_adapters_come_and_go(served: Running, other_run: Run, answers: dict[str, str | None]) -> None:
    """Add one, put it in the place of the tuned one, and take it away, all in the running engine."""
    process, headers = served.service.supervisor._process, {"Authorization": "Bearer secret"}
    values = {ADMIN_VARIABLE: "secret", "LLMLAB_RUNS": str(other_run.path.parents[2])}
    with environment(**values), httpx.Client(base_url=served.url, headers=headers, trust_env=False, timeout=300) as admin:

        def ask(name: str) -> httpx.Response:
            body = {"model": name, "messages": CHAT, "max_tokens": 12, "temperature": 0}
            return admin.post("/v1/chat/completions", json=body)

        for name in ("other", TUNED):
            added = admin.post("/v1/adapters", json={"run": other_run.id, "name": name})
            assert added.status_code == 201, added.text
        found = [ask(name).json()["choices"][0]["message"]["content"] for name in ("other", TUNED)]
        assert found[0] == found[1] and found[0] not in answers.values()
        assert admin.delete("/v1/adapters/other").status_code == 200 and ask("other").status_code == 404
        assert ask(TUNED).json()["choices"][0]["message"]["content"] == found[0]
        wait_until(lambda: not admin.get("/v1/adapters").json()["changing"])
        listed = httpx.get(f"{served.engine_url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in listed] == [MODEL, f"{TUNED}@{other_run.id}"], "vLLM forgot what is not served"
    assert served.service.supervisor._process is process


def check_metrics_have_the_names_that_the_rules_read(served: Running) -> None:
    """Every series of vLLM in the rules is there, under the name of today or the one before."""
    text = httpx.get(f"{served.url}/metrics/engine", trust_env=False, timeout=10).text
    exported = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    missing = {name for name in ENGINE_NAMES if name.startswith("vllm:")} - exported
    older = {"vllm:time_per_output_token_seconds_bucket", "vllm:time_per_output_token_seconds_sum", "vllm:gpu_cache_usage_perc"}
    assert missing <= older, missing


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason=".venv-vllm does not exist: make setup-vllm")
def test_vllm_serves_base_and_adapters_through_the_gateway(tuned_run: Run, other_run: Run, index_root: Path) -> None:
    with ExitStack() as stack:
        with environment(LLMLAB_RUNS=str(tuned_run.path.parents[2]), LLMLAB_INDEX=str(index_root)):
            served = stack.enter_context(running(MODEL, serve_config("engine=vllm"), say=lambda _: None))
        client = stack.enter_context(openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=300))
        answers = {}
        for name in (MODEL, TUNED):
            whole = client.chat.completions.create(model=name, messages=CHAT, max_tokens=12, temperature=0)  # type: ignore[arg-type]
            stream = client.chat.completions.create(model=name, messages=CHAT, max_tokens=12, temperature=0, stream=True)  # type: ignore[call-overload]
            answers[name] = whole.choices[0].message.content
            assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == answers[name]
        assert answers[MODEL] != answers[TUNED]
        check_adapters_come_and_go(served, other_run, answers)
        reply = httpx.post(
            f"{served.url}/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 16}, timeout=300
        ).json()
        assert [p["title"].split(" ")[0] for p in reply["passages"]][0] == "Vela"
        assert reply["model"] == TUNED and reply["timings"]["ttft_seconds"] > 0
        check_metrics_have_the_names_that_the_rules_read(served)
