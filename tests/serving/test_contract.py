"""Every engine through one contract: what the gateway relies on, asked of the real server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines import catalogue
from pipelines.architecture import cache_of, config_of
from pipelines.errors import ConfigError, EngineError, UnknownName
from pipelines.hardware import VLLM_PYTHON
from pipelines.runs import Run
from serving import engines
from serving.address import check_free
from serving.engines import vllm
from serving.engines.contract import Adapter, Engine, Launch
from serving.engines.llamacpp import SCHEMA_WORDS
from serving.supervisor import Supervisor
from serving.tuned import adapter_of, check_template
from tests.serving.conftest import MODEL, TUNED, descendants, gone, serve_config

NO_VLLM = pytest.mark.skipif(not VLLM_PYTHON.exists(), reason=".venv-vllm does not exist: make setup-vllm")
ENGINES = ["llamacpp", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.timeout(900), NO_VLLM])]
CHAT = [{"role": "user", "content": "Write the numbers from one to ten."}]


@pytest.fixture(scope="module", params=ENGINES)
def started(
    request: pytest.FixtureRequest, tuned_run: Run, other_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Supervisor]:
    engine = engines.named(request.param)
    launch = Launch(
        model=MODEL,
        base=engine.base_path(catalogue.runnable(MODEL), False, print),
        adapters=(adapter_of(tuned_run, MODEL), adapter_of(other_run, MODEL, "other")),
        host="127.0.0.1",
        port=check_free("127.0.0.1", 0, ""),
        context_tokens=512,
        slots=2,
        threads=1,
        gpu=False,
        work=tmp_path_factory.mktemp("work"),
    )
    supervisor = Supervisor(engine, launch, 600.0, serve_config().restart)
    supervisor.spawn()
    try:
        supervisor.await_health()
        yield supervisor
    finally:
        processes = descendants(supervisor._process.pid) if supervisor._process else []
        supervisor.stop()
        assert gone(processes)


def ask(supervisor: Supervisor, **body: Any) -> httpx.Response:
    request = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0} | body
    content = supervisor.engine.select(request, supervisor.launch)
    return httpx.post(f"{supervisor.launch.url}/v1/chat/completions", json=content, timeout=120, trust_env=False)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_model_selects_base_or_adapter(started: Supervisor) -> None:
    base, tuned = text(ask(started)), text(ask(started, model=TUNED))
    assert base != tuned
    assert text(ask(started)) == base and text(ask(started, model=TUNED)) == tuned, "the order of requests must not matter"


def test_each_name_has_an_adapter_of_its_own(started: Supervisor) -> None:
    answers = {name: text(ask(started, model=name)) for name in started.launch.names}
    assert list(answers) == [MODEL, TUNED, "other"] and len(set(answers.values())) == 3
    with pytest.raises(UnknownName, match="one of"):
        started.engine.select({"model": "gone", "messages": CHAT}, started.launch)


def test_no_adapter_goes_on_from_what_another_has_computed(started: Supervisor) -> None:
    """Keys and values depend on the adapter; llama.cpp's cache of old prompts would hand those of the base to an adapter."""
    if started.engine.name != "llamacpp":
        pytest.skip("vLLM keys its cache by adapter")
    first, *others = [[{"role": "user", "content": f"{word} " * 40 + "?"}] for word in ("blue", "stone", "river", "lamp")]

    def reused(chat: list[dict[str, str]], name: str) -> int:
        """Return how many tokens of a prompt were not computed for it."""
        return int(ask(started, messages=chat, model=name, max_tokens=1).json()["timings"]["cache_n"])

    reused(first, MODEL)
    for chat in others:
        reused(chat, TUNED)
    assert reused(first, TUNED) < 30, "the turn of the system and no more"
    assert reused(first, TUNED) > 60


def test_the_answer_counts_tokens(started: Supervisor) -> None:
    for name in (MODEL, TUNED):
        answer = ask(started, model=name).json()
        assert answer["usage"]["completion_tokens"] == 12 and answer["usage"]["prompt_tokens"] > 10


def test_it_renders_chats_as_training_did(started: Supervisor, tuned_run: Run) -> None:
    check_template(tuned_run, started.engine, started.launch)


def test_a_prompt_that_is_too_long_comes_with_its_sizes(started: Supervisor) -> None:
    response = ask(started, messages=[{"role": "user", "content": "word " * 900}])
    assert response.status_code == 400
    error = response.json().get("error", response.json())
    overflow = started.engine.overflow(error)
    assert overflow and overflow.context_tokens == 512, error
    assert overflow.prompt_tokens is None or overflow.prompt_tokens > 500, error
    assert started.engine.overflow({"message": "temperature must be a number", "type": "x"}) is None


def test_its_metrics_have_the_names_it_gives(started: Supervisor) -> None:
    ask(started)
    exposed = httpx.get(started.launch.url + started.engine.metrics_path, trust_env=False).text
    for name in started.engine.metric_names.values():
        assert f"\n{name}" in exposed, name


def test_it_streams_usage(started: Supervisor) -> None:
    response = ask(started, stream=True, stream_options={"include_usage": True})
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    last = json.loads(data[-2])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12


def test_it_says_what_it_can_do(started: Supervisor) -> None:
    with httpx.Client(trust_env=False, timeout=60) as client:
        able = started.engine.abilities(client, started.launch)
    if started.engine.name == "llamacpp":
        assert able.vocabulary == 49152 and not able.tool_choices and "shows no tools" in able.tools_reason
    else:
        assert able.tool_choices == {"none", "required", "named"} and "parser" in able.tools_reason


def test_what_llamacpp_is_said_to_lack_it_still_leaves_out(started: Supervisor) -> None:
    """Where it has learned to obey, the table in its module can shrink."""
    if started.engine.name != "llamacpp":
        pytest.skip("vLLM refuses what it cannot do")
    body = {"prompt": "One, two,", "echo": True, "max_tokens": 2, "temperature": 0}
    echo = httpx.post(f"{started.launch.url}/v1/completions", json=body, timeout=60, trust_env=False).json()
    assert not echo["choices"][0]["text"].startswith("One")
    ignored = {"multipleOf": {"type": "integer", "multipleOf": 1000}, "not": {"not": {"type": "integer"}},
               "pattern": {"type": "string", "pattern": "zq+"}, "format": {"type": "string", "format": "email"}}  # fmt: skip
    for word, schema in ignored.items():
        assert word not in SCHEMA_WORDS.known or word in ("pattern", "format")
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        reply = text(ask(started, response_format=form, max_tokens=6))
        assert "000" not in reply and "zq" not in reply and "@" not in reply, reply
    assert text(ask(started, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], tool_choice="required"))


def adapter_with(rank: int, path: Path, name: str = TUNED) -> Adapter:
    (path / "adapter").mkdir(parents=True, exist_ok=True)
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank}), encoding="utf-8")
    return Adapter(name, Run(path, "finetune", MODEL, "", False, (), {}, ""))


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (4, 8), (16, 16), (257, 320)])
def test_vllm_gets_a_rank_it_accepts(tmp_path: Path, rank: int, allowed: int) -> None:
    assert vllm.lora_rank([adapter_with(rank, tmp_path)]) == allowed


def vllm_command(path: Path, *adapters: Adapter, **settings: int) -> list[str]:
    group = serve_config(*(f"vllm.{key}={value}" for key, value in settings.items())).vllm
    launch = Launch(MODEL, path, adapters, "127.0.0.1", 1, 512, 1, 2, True, path, vllm=group)
    assert ("True" == vllm.Vllm().environment(launch)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]) == ("--enable-lora" in (
        command := vllm.Vllm().command(launch)))  # fmt: skip
    return command


def test_vllm_has_room_for_all_adapters_and_for_some_that_may_come(tmp_path: Path) -> None:
    small, large = adapter_with(4, tmp_path / "a"), adapter_with(60, tmp_path / "b", "large")
    command = vllm_command(tmp_path, small, large)
    assert {"--max-lora-rank=64", "--max-loras=4"} <= set(command)
    assert command[command.index("--lora-modules") + 1 :] == [f"{TUNED}@a={tmp_path}/a/adapter", f"large@b={tmp_path}/b/adapter"]
    assert {"--max-lora-rank=16", "--max-loras=2"} <= set(vllm_command(tmp_path))
    assert {"--max-lora-rank=8", "--max-loras=1"} <= set(vllm_command(tmp_path, small, spare_adapters=0))
    assert not any("lora" in part for part in vllm_command(tmp_path, spare_adapters=0))


def test_vllm_is_spread_as_the_settings_say(tmp_path: Path) -> None:
    assert not any("parallel" in part or "ray" in part for part in vllm_command(tmp_path))
    assert {"--tensor-parallel-size=4", "--pipeline-parallel-size=1"} <= set(vllm_command(tmp_path, tensor_parallel=4))
    across = vllm_command(tmp_path, tensor_parallel=4, pipeline_parallel=2, nodes=2)
    assert {"--tensor-parallel-size=4", "--pipeline-parallel-size=2", "--distributed-executor-backend=ray"} <= set(across)
    with pytest.raises(ConfigError, match="do not spread over 3 nodes"):
        vllm_command(tmp_path, tensor_parallel=4, nodes=3)
    settings = serve_config("vllm.tensor_parallel=4", "vllm.nodes=2").vllm
    vllm.check_gpus(settings, 2)
    with pytest.raises(ConfigError, match="asks for 2 GPUs on this machine, it has 1"):
        vllm.check_gpus(settings, 1)


def test_a_context_that_no_gpu_has_room_for_is_refused_before_the_load(tmp_path: Path) -> None:
    cache = cache_of(config_of(catalogue.find("mistral-7b")))
    assert cache.bytes(1) == 2 * 2 * 32 * 8 * 128
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(14 * 2**30)  # a file of no blocks
    group = serve_config("vllm.tensor_parallel=2").vllm
    launch = Launch(MODEL, tmp_path, (), "127.0.0.1", 1, 32768, 1, 2, True, tmp_path, gpu_memory_share=0.5, vllm=group)
    vllm.check_room(launch, cache, 40 * 2**30)
    with pytest.raises(EngineError, match=r"14.00 GiB leave 2.00 GiB of 2 GPU for the cache, 16384 tokens") as caught:
        vllm.check_room(launch, cache, 16 * 2**30)
    assert caught.value.next_command == "--set context_tokens=16384"


@pytest.mark.parametrize("name", ["llamacpp", "vllm"])
def test_commands_are_lists_and_secrets_free(tmp_path: Path, name: str) -> None:
    engine: Engine = engines.named(name)
    launch = Launch(MODEL, tmp_path / "a model; with spaces", (), "127.0.0.1", 1, 512, 1, 2, False, tmp_path)
    command = engine.command(launch)
    assert all(isinstance(part, str) for part in command) and any("a model; with spaces" in part for part in command)
    assert command[0] == (sys.executable if name == "llamacpp" else str(VLLM_PYTHON))


# As vLLM writes them (v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py, v1/executor, config); a slow test asks the real one
# for that about the length.
SENTENCES = [
    ("ValueError: To serve at least one request with the models's max seq len (32768), (14.50 GiB KV cache is needed, which is "
     "larger than the available KV cache memory (6.20 GiB). Based on the available memory, the estimated maximum model length "
     "is 8192. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.",
     "32768 tokens needs 14.50 GiB, and 6.20 GiB", "--set context_tokens=8192"),
    ("ValueError: To serve at least one request with the model's max seq len (4096), 23.38 GiB KV cache is needed, which is "
     "larger than the available KV cache memory (22.61 GiB).",
     "4096 tokens needs 23.38 GiB, and 22.61", "--set context_tokens=2048"),
    ("ValueError: Free memory on device cuda:0 (3.27/15.98 GiB) on startup is less than desired GPU memory utilization (0.9, "
     "14.39 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
     "3.27 of 15.98 GiB are free", "gpu_memory_share=0.5"),
    ("ValueError: Free memory on device (3.27/15.98 GiB) on startup is less than desired GPU memory utilization (0.9, 14.39 GiB)",
     "3.27 of 15.98 GiB are free", "gpu_memory_share=0.5"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.48 GiB.", "leave no GPU memory", "gpu_memory_share=0.95"),
    ("User-specified max_model_len (65536) is greater than the derived max_model_len (max_position_embeddings=32768.0 or "
     "model_max_length=None in model's config.json).", "context_tokens is 65536", "--set context_tokens=32768"),
    ("Value error, World size (4) is larger than the number of available GPUs (1) in this node. If this is intentional and you "
     "are using:", "4 GPUs are asked for, and this machine shows 1", "vllm.tensor_parallel=1"),
    ("ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group.",
     "fewer GPUs", "ray status"),
    ("Value error, Total number of attention heads (9) must be divisible by tensor parallel size (2).", "9 attention heads",
     "vllm.tensor_parallel=1"),
    ("ValueError: Failed to import Ray: No module named 'ray'.Please install Ray with `pip install ray`.", "Ray is not in",
     "pip install ray"),
    ("RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", "cannot talk to each other: NCCL "
     "error: unhandled system error", "NCCL_DEBUG=INFO"),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "came", "next_command"), SENTENCES)
def test_what_vllm_says_is_translated(sentence: str, came: str, next_command: str) -> None:
    trouble = vllm.Vllm().trouble(f"INFO starting\n{sentence}\nRuntimeError: Engine core initialization failed.")
    assert trouble and came in trouble.came and next_command in trouble.next_command
    assert vllm.Vllm().trouble("RuntimeError: Engine core initialization failed.") is None


@pytest.mark.parametrize(
    ("name", "context", "expected"),
    [
        pytest.param("llamacpp", 2_000_000, "llama.cpp got no memory", marks=pytest.mark.slow),
        pytest.param("vllm", 100_000, "context_tokens is 100000", marks=[pytest.mark.slow, pytest.mark.timeout(600), NO_VLLM]),
    ],
)
def test_a_real_engine_without_room_says_why(name: str, context: int, expected: str, tmp_path: Path) -> None:
    engine = engines.named(name)
    base = engine.base_path(catalogue.runnable(MODEL), False, print)
    launch = Launch(MODEL, base, (), "127.0.0.1", check_free("127.0.0.1", 0, ""), context, 64, 1, False, tmp_path)
    supervisor = Supervisor(engine, launch, 500.0, serve_config().restart)
    supervisor.spawn()
    try:
        with pytest.raises(EngineError, match=expected):
            supervisor.await_health()
    finally:
        supervisor.stop()
