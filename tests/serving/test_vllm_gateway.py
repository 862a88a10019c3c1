"""vLLM behind the same gateway: base and adapter through the OpenAI client, and a question to the index."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from pipelines.hardware import VLLM_PYTHON
from pipelines.runs import Run
from serving.launch import running
from tests.serving.conftest import MODEL, TUNED, environment, serve_config


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason=".venv-vllm does not exist: make setup-vllm")
def test_vllm_serves_base_and_adapter_through_the_gateway(tuned_run: Run, index_root: Path) -> None:
    chat = [{"role": "user", "content": "Write the numbers from one to ten."}]
    with ExitStack() as stack:
        with environment(LLMLAB_RUNS=str(tuned_run.path.parents[2]), LLMLAB_INDEX=str(index_root)):
            served = stack.enter_context(running(MODEL, serve_config("engine=vllm"), say=lambda _: None))
        client = stack.enter_context(openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=300))
        answers = {}
        for name in (MODEL, TUNED):
            whole = client.chat.completions.create(model=name, messages=chat, max_tokens=12, temperature=0)  # type: ignore[arg-type]
            stream = client.chat.completions.create(model=name, messages=chat, max_tokens=12, temperature=0, stream=True)  # type: ignore[call-overload]
            answers[name] = whole.choices[0].message.content
            assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == answers[name]
        assert answers[MODEL] != answers[TUNED]
        reply = httpx.post(
            f"{served.url}/v1/rag/query", json={"question": "Who made Vela?", "max_tokens": 16}, timeout=300
        ).json()
        assert [p["title"].split(" ")[0] for p in reply["passages"]][0] == "Vela"
        assert reply["model"] == TUNED and reply["timings"]["ttft_seconds"] > 0
