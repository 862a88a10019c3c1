"""A small model in llama.cpp: written as GGUF by the code of `llmlab export`, run as `llmlab serve` runs it, and timed.

Speed and memory of an engine do not depend on what the weights say, so random ones are as good as any for these.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labs.frame.small import Small
from pipelines.catalogue import runnable
from pipelines.errors import EngineError
from pipelines.export.convert import to_gguf
from pipelines.export.quantise import F16, quantise
from pipelines.tune.rehearsal import write_pieces
from pipelines.weights import quiet_loading

if TYPE_CHECKING:
    from serving.supervisor import Supervisor

PRE_TOKENIZER = "gpt-2"  # of tokenizers that are trained here, as in pipelines.export.job
STARTUP_SECONDS = 120.0
REPLY_SECONDS = 600.0
LEAST_CPU_SECONDS = 0.5  # 50 steps of a clock that counts hundredths of a second
STILL_SECONDS = 60.0  # before a processor time that does not grow counts as one that is not counted
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Speed:
    """What llama.cpp says of one request, or of several at once together, in tokens per second."""

    prompt: float
    generated: float


@dataclass(frozen=True)
class Engine:
    """A running engine."""

    url: str
    supervisor: Supervisor

    def memory_bytes(self) -> int:
        """Return the memory of the engine: weights that are mapped from their file and were used, cache, the program."""
        return self.supervisor.memory_bytes()

    def cpu_seconds_per_token(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Return the processor time that the engine spends on a written token, the prompts' own time included in it.

        The system counts the time of another process in steps, mostly of a hundredth of a second, so the prompts are sent again
        until that are many.

        Args:
            prompts: token ids; all are sent at once.
            tokens: that are written for each.

        Raises:
            EngineError: the engine has ended, or its processor time does not grow while it writes.
        """
        before, since, written, spent = self.supervisor.cpu_seconds(), time.monotonic(), 0, 0.0
        while spent < LEAST_CPU_SECONDS:
            if not spent and time.monotonic() - since > STILL_SECONDS:
                came = f"llama.cpp wrote {written} tokens in {STILL_SECONDS:.0f} s without any processor time"
                raise EngineError(came, "a system that counts the time of child processes", "measure on another machine")
            self.ask_at_once(prompts, tokens)
            written += tokens * len(prompts)
            spent = self.supervisor.cpu_seconds() - before
        return spent / written

    def ask(self, prompt: Sequence[int], tokens: int) -> Speed:
        """Send token ids, let it write `tokens` more, and return how fast it was."""
        import httpx

        body = {"prompt": list(prompt), "n_predict": tokens, "ignore_eos": True, "temperature": 1.0, "cache_prompt": False}
        reply = httpx.post(f"{self.url}/completion", json=body, timeout=REPLY_SECONDS, trust_env=False).raise_for_status()
        timings = reply.json()["timings"]
        return Speed(float(timings["prompt_per_second"]), float(timings["predicted_per_second"]))

    def ask_at_once(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Send several at once and return the tokens that all of them were written in a second."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return sum(speed.generated for speed in threads.map(lambda prompt: self.ask(prompt, tokens), prompts))


def write(small: Small, name: str, folder: Path) -> Path:
    """Write a model as GGUF in 16 bits and return the file.

    Args:
        small: a model and its tokenizer.
        name: its catalogue entry.
        folder: for the file and, below it, the model as transformers writes it.

    Raises:
        ExportFailed: llama.cpp's converter does not know the architecture, or is not here.
    """
    whole = folder / "model"
    with quiet_loading():
        small.model.save_pretrained(whole)
    small.tokenizer.save_pretrained(whole)
    write_pieces(runnable(name), small.tokenizer, whole)
    file = folder / f"{F16}.gguf"
    to_gguf(whole, file, PRE_TOKENIZER)
    return file


def smaller(file: Path, name: str) -> Path:
    """Return the file of a quantisation beside that in 16 bits; it is made unless it is there."""
    made = file.with_name(f"{name}.gguf")
    if not made.is_file():
        quantise(file, made, name, lambda *_: None)
    return made


@contextmanager
def running(file: Path, work: Path, *, context_tokens: int, slots: int = 1, threads: int | None = None) -> Iterator[Engine]:
    """Run a GGUF file as the gateway would, without one, and yield the engine.

    Args:
        file: of the model.
        work: folder of its log.
        context_tokens: of each slot.
        slots: texts written at once.
        threads: all cores if not given.

    Raises:
        EngineError: it did not start.
    """
    from pipelines.hardware import probe
    from serving.address import check_free
    from serving.engines import named
    from serving.engines.contract import Launch
    from serving.settings import load_serve_config
    from serving.supervisor import Supervisor

    port, threads = check_free(HOST, 0, ""), threads or probe().cpus
    launch = Launch(model="lab", base=file, adapters=(), host=HOST, port=port, slots=slots, gpu=False, work=work,
                    context_tokens=context_tokens, threads=threads)  # fmt: skip
    supervisor = Supervisor(named("llamacpp"), launch, STARTUP_SECONDS, load_serve_config().restart)
    try:
        supervisor.spawn()
        supervisor.await_health()
        yield Engine(launch.url, supervisor)
    finally:
        supervisor.stop()
