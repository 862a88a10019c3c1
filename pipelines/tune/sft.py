"""Supervised fine-tuning of a LoRA adapter: the training loop, its checkpoints and its progress.

It takes a model that already has its adapter and the packed groups; it knows nothing about runs, the catalogue or where
data comes from. Logits are computed at labels only, since the output layer is a fifth of a small model's work.
Checkpoints are safetensors and JSON, written whole or not at all; batches and random state follow from seed and step, so
a resumed training continues as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import TrainingFailed
from pipelines.tune.packing import Packed, collate
from pipelines.tune.recipe import Optimiser, Recipe

if TYPE_CHECKING:
    import torch

PROGRESS_FILE = "progress.json"
TENSORS_FILE = "state.safetensors"


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured; `loss` is the mean negative log-likelihood of a supervised token, in nats."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    eta_seconds: float
    peak_memory_bytes: int


OnStep = Callable[[Step], None]


class Training:
    """An adapter in training: `run` goes from the last checkpoint to the end.

    Args:
        model: a PEFT model on its device.
        groups: packed groups; step i takes `groups_per_step` of them in order.
        recipe: optimiser and schedule.
        pad_token: token id that fills short rows; it is never looked at.
        checkpoint: folder of the resumable state.

    Raises:
        TrainingFailed: no supervised token in the data, or a loss that is not finite.
    """

    def __init__(self, model: Any, groups: Sequence[Packed], recipe: Recipe, pad_token: int, checkpoint: Path) -> None:
        import torch

        if not sum(group.supervised for group in groups):
            raise TrainingFailed(
                "the data has no supervised token: there is nothing to learn", "answers that survive the template"
            )
        self.model, self.groups, self.schedule = model, groups, recipe.schedule
        self.optimiser_recipe, self.pad_token, self.checkpoint = recipe.optimiser, pad_token, checkpoint
        self.device = next(model.parameters()).device.type
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rate, decay = recipe.optimiser.learning_rate, recipe.optimiser.weight_decay
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=rate, weight_decay=decay)
        self.first_step = self._restore()

    def run(self, on_step: OnStep) -> None:
        """Train to the end; on Ctrl-C the step is finished and a checkpoint written before `KeyboardInterrupt` goes on."""
        self.model.train()
        began = time.perf_counter()
        with _interrupts_wait() as interrupted:
            for step in range(self.first_step, self.schedule.steps):
                on_step(self._step(step, began))
                done = step + 1
                if interrupted() or done % self.schedule.checkpoint_every_steps == 0 or done == self.schedule.steps:
                    self.save(done)
                if interrupted():
                    raise KeyboardInterrupt

    def save(self, done: int) -> None:
        """Write the state after `done` steps: adapter and AdamW moments."""
        from safetensors.torch import save_file

        temporary = self.checkpoint.with_name(self.checkpoint.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(self._tensors(), temporary / TENSORS_FILE)
        (temporary / PROGRESS_FILE).write_text(json.dumps({"done": done}), encoding="utf-8")
        old = self.checkpoint.with_name(self.checkpoint.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint.exists():
            os.rename(self.checkpoint, old)
        os.rename(temporary, self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def _step(self, step: int, began: float) -> Step:
        import torch

        began_step = time.perf_counter()
        rate = learning_rate(self.optimiser_recipe, step, self.schedule.steps)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate
        size = self.schedule.groups_per_step
        chosen = [self.groups[i % len(self.groups)] for i in range(step * size, (step + 1) * size)]
        torch.manual_seed(self.schedule.seed + step)
        loss, supervised = self._backward(chosen)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.optimiser_recipe.max_gradient_norm)
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} at step {step + 1}", "a finite loss",
                                 f"--set optimiser.learning_rate={self.optimiser_recipe.learning_rate / 3:g}")  # fmt: skip
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        tokens = sum(len(group.tokens) for group in chosen)
        now, remaining = time.perf_counter(), self.schedule.steps - step - 1
        eta = (now - began) / (step + 1 - self.first_step) * remaining
        return Step(step + 1, self.schedule.steps, loss, float(norm), rate, tokens, supervised,
                    tokens / (now - began_step), eta, peak_memory_bytes(self.device))  # fmt: skip

    def _backward(self, chosen: Sequence[Packed]) -> tuple[float, int]:
        """Accumulate the gradient of the mean loss over all labels of the step, one group at a time."""
        supervised = sum(group.supervised for group in chosen)
        total = 0.0
        for group in chosen:
            if group.supervised:
                loss = label_loss(self.model, collate([group], self.pad_token, self.device)) / supervised
                loss.backward()
                total += float(loss.detach())
        return total, supervised

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"adapter.{name}": p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        return {name: t.contiguous().clone() for name, t in tensors.items()}

    def _restore(self) -> int:
        """Load the checkpoint if there is one; return the number of finished steps."""
        import torch
        from safetensors.torch import load_file

        old = self.checkpoint.with_name(self.checkpoint.name + ".old")
        if not self.checkpoint.exists() and old.exists():  # killed between the two renames of `save`
            os.rename(old, self.checkpoint)
        if not (self.checkpoint / PROGRESS_FILE).is_file():
            return 0
        tensors = load_file(self.checkpoint / TENSORS_FILE)
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(tensors[f"adapter.{name}"])
                moments = {
                    key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors
                }
                if moments:
                    self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        return int(json.loads((self.checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))["done"])


@contextmanager
def _interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C does not wait, and saves nothing."""
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def label_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed negative log-likelihood of the labels of a collated batch, a scalar in nats."""
    import torch

    logits = label_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")


def label_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits at the labelled places only, [N, vocabulary]."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    return causal.get_output_embeddings()(hidden.flatten(0, 1)[batch["label_places"]])


def learning_rate(recipe: Optimiser, step: int, steps: int) -> float:
    """Return the rate for a step: linear warm-up, then cosine decay to zero (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    warmup = max(1, round(steps * recipe.warmup_share))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this process so far: of the GPU on "cuda", resident memory otherwise."""
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_row(step: Step) -> dict[str, Any]:
    """Return a step as a row for metrics.jsonl."""
    return asdict(step)
