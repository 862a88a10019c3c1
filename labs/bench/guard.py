"""What the guards cost: `llmlab bench guard`. The text is that of the knowledge base; no engine is asked.

Milliseconds are of processor time: guards wait for nothing, so other work on the machine does not show.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines import catalogue, weights
from pipelines.rag.load import load
from pipelines.tune.data import KNOWLEDGE
from serving.guard.contract import Told
from serving.guard.gate import Gate
from serving.guard.reply import Reply
from serving.settings import load_serve_config

MODEL = "smollm2-135m"  # whose tokens are counted
PROMPT_TOKENS, REPLY_TOKENS, PASSAGES = 2000, 256, 5
GUARDS: Mapping[str, tuple[str, ...]] = {
    "as configured": (),
    "all": ("guard.secrets.chunks=redact", "guard.personal.input=redact", "guard.personal.chunks=redact",
            "guard.personal.output=redact"),
}  # fmt: skip


@dataclass(frozen=True)
class _Passages:
    """What the guard on passages looks at."""

    hits: tuple[Any, ...]
    held_back: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Passage:
    title: str
    text: str


def bench_guard(rounds: int) -> dict[str, Any]:
    """Return milliseconds by guards and stage: `input` for a prompt, `chunk` for five passages, `output` for a streamed chunk.

    Args:
        rounds: prompts and passages looked at; one streamed reply is looked at for every ten of them.

    Raises:
        WeightsMissing: the tokenizer that counts is not on this machine.
    """
    pieces = _pieces()
    prompt, reply = "".join(pieces[:PROMPT_TOKENS]), pieces[PROMPT_TOKENS : PROMPT_TOKENS + REPLY_TOKENS]
    size = PROMPT_TOKENS // (2 * PASSAGES)
    hits = tuple(_Passage("A title", "".join(pieces[i * size : (i + 1) * size])) for i in range(PASSAGES))
    found: Any = _Passages(hits)
    guards = {}
    for name, overrides in GUARDS.items():
        gate = Gate(load_serve_config("default", overrides).guard)
        streamed = [one for _ in range(max(1, rounds // 10)) for one in _stream(gate, reply)]
        guards[name] = {"input": _quantiles(_times(rounds, partial(gate.question, prompt, Told()))),
                        "chunk": _quantiles(_times(rounds, partial(gate.passages, found, Told()))),
                        "output": _quantiles(streamed)}  # fmt: skip
    return {"prompt_tokens": PROMPT_TOKENS, "prompt_chars": len(prompt), "passages": PASSAGES, "rounds": rounds, "guards": guards}


def _pieces() -> list[str]:
    """Return pages of the knowledge base, token by token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.obtain(catalogue.runnable(MODEL), pull=False, say=lambda _: None))
    text = "\n".join(section.text for document in load(KNOWLEDGE)[0] for section in document.sections)
    tokens = tokenizer(text[:40_000])["input_ids"][: PROMPT_TOKENS + REPLY_TOKENS]
    return [tokenizer.decode([token]) for token in tokens]


def _stream(gate: Gate, pieces: list[str]) -> list[float]:
    """Return the seconds that each chunk of a streamed reply takes."""
    reply = Reply(gate.windows, Told(), 1)
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    return [_seconds(partial(reply.event, event)) for event in events]


def _times(rounds: int, work: Callable[[], object]) -> list[float]:
    return [_seconds(work) for _ in range(rounds)]


def _seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _quantiles(seconds: list[float]) -> dict[str, float]:
    shares = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": 1000 * shares[49], "p99_ms": 1000 * shares[98]}
