"""The training loop: steps, gradient accumulation, checkpoints, Ctrl-C and the figures of each step.

It takes a model, the steps made by pipelines.tune.source and an objective; it knows nothing about runs, the catalogue or
where data comes from. A resumed training goes on bit for bit as if it had not been interrupted.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import OutOfMemory, TrainingFailed
from pipelines.tune.adapter import checkpoint_activations
from pipelines.tune.checkpoint import Checkpoints
from pipelines.tune.memory import Ladder, is_out_of_memory, release
from pipelines.tune.packing import Packed
from pipelines.tune.parallel import Team
from pipelines.tune.recipe import Optimiser, Recipe

if TYPE_CHECKING:
    import torch

ALONE = Team()
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LORA_B, RATIO = ".lora_B.", "rate_ratio"
PAGED_MOMENTS = ("step", "state1", "state2")  # the names of bitsandbytes


class Objective(Protocol):
    """What is minimised: a mean over terms, taken apart so that it can be summed over parts of a step.

    Attributes:
        divisible: the rows of a sequence may be computed apart.
    """

    divisible: bool

    def count(self, sequences: Sequence[Packed]) -> int:
        """Return the number of terms in these sequences."""

    def total(self, model: Any, sequences: Sequence[Packed]) -> torch.Tensor:
        """Return the sum of their terms, a scalar that can be differentiated."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured; `loss` is the mean of the objective (for sft: nats per supervised token)."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    rows: int
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    eta_seconds: float
    peak_memory_bytes: int


OnStep = Callable[[Step], None]


class Training:
    """A model in training: `run` goes from the newest checkpoint to the end.

    Args:
        model: on its device; what requires a gradient is trained.
        steps: for each optimiser step its packed sequences.
        recipe: optimiser and schedule.
        objective: what is minimised.
        checkpoint: folder of the resumable state.
        team: the processes that share the work of a step.
        say: takes a line for the user.

    Raises:
        TrainingFailed: a loss that is not finite.
        OutOfMemory: not even the smallest part of a step fits.
    """

    def __init__(self, model: Any, steps: Sequence[Sequence[Packed]], recipe: Recipe, objective: Objective, checkpoint: Path,
                 team: Team = ALONE, say: Callable[[str], None] = lambda _: None) -> None:  # fmt: skip
        self.model, self.steps, self.schedule, self.objective, self.say = model, steps, recipe.schedule, objective, say
        self.ladder = Ladder(recipe.schedule, steps, checkpoint, divisible=objective.divisible)
        self.optimiser_recipe, self.checkpoints = recipe.optimiser, Checkpoints(checkpoint)
        self.device = next(model.parameters()).device.type
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.paged = recipe.quantised and self.device == "cuda"
        self.optimiser = self._optimiser()
        self.team = team
        self.first_step = team.agree(self._restore())

    def run(self, on_step: OnStep) -> None:
        """Train to the end; on Ctrl-C the step is finished and a checkpoint written before `KeyboardInterrupt` goes on."""
        self.model.train()
        self._obey_rung()
        seconds: list[float] = []
        with _interrupts_wait() as interrupted:
            for step in range(self.first_step, len(self.steps)):
                on_step(self._step(step, seconds))
                done = step + 1
                if interrupted() or done % self.schedule.checkpoint_every_steps == 0 or done == len(self.steps):
                    self.checkpoints.save(done, self._tensors())
                if interrupted():
                    raise KeyboardInterrupt

    def assist(self) -> None:
        """Compute this process's share of each step for the leader, to the end."""
        self.model.train()
        for step in range(self.first_step, len(self.steps)):
            self._gradient(step)
            self.model.zero_grad(set_to_none=True)

    def _gradient(self, step: int) -> tuple[float, Sequence[Packed]]:
        """Leave the gradient of a step in the leader's parameters; return its loss and what it was computed on."""
        import torch

        self.team.spread(self.trained)
        while True:
            torch.manual_seed(self.schedule.seed + step)
            done = self._backward_or_none(self.steps[step])
            if done is not None:
                loss, sequences = done
                return self.team.gather(self.trained, loss), sequences
            release(self.model)
            self.say(f"memory ran out in step {step + 1}; the same step again with {self.ladder.down()}")
            self._obey_rung()

    def _backward_or_none(self, step: Sequence[Packed]) -> tuple[float, Sequence[Packed]] | None:
        """Return the loss and its sequences, or None if memory ran out; then nothing of the step is referred to any more."""
        try:
            sequences = self.ladder.divided(step)
            return self._backward(sequences), sequences
        except Exception as error:  # torch has no error type of its own for a CPU
            if not is_out_of_memory(error):
                raise
            if self.team.size > 1:
                raise OutOfMemory(f"memory ran out in one of {self.team.size} processes, which cannot take a step apart",
                                  "room for all of them", "the same command without --processes") from None  # fmt: skip
            return None

    def _obey_rung(self) -> None:
        if self.ladder.rung.checkpointing and not self.schedule.checkpointing:
            checkpoint_activations(self.model)

    def _step(self, step: int, seconds: list[float]) -> Step:
        import torch

        began = time.perf_counter()
        rate = learning_rate(self.optimiser_recipe, step, len(self.steps))
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate * parameters[RATIO]
        loss, sequences = self._gradient(step)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.optimiser_recipe.max_gradient_norm)
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} at step {step + 1}", "a finite loss",
                                 f"--set optimiser.learning_rate={self.optimiser_recipe.learning_rate / 3:g}")  # fmt: skip
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        tokens = sum(len(p.tokens) for p in sequences)
        eta = sum(seconds) / len(seconds) * (len(self.steps) - step - 1)
        return Step(step + 1, len(self.steps), loss, float(norm), rate, sum(p.rows for p in sequences), tokens,
                    sum(p.supervised for p in sequences), seconds[-1], tokens / seconds[-1], eta,
                    peak_memory_bytes(self.device))  # fmt: skip

    def _backward(self, sequences: Sequence[Packed]) -> float:
        """Accumulate this process's part of the gradient of the mean over all terms, a few sequences at a time."""
        terms, loss = self.objective.count(sequences), 0.0
        for together, weight in self.team.rounds(sequences, self.ladder.rung.sequences_at_once):
            part = self.objective.total(self.model, together) * (weight / terms)
            part.backward()
            loss += float(part.detach())
        return loss

    def _optimiser(self) -> torch.optim.Optimizer:
        """AdamW; in pages that move to main memory under pressure where the base is quantised on a GPU (arXiv 2305.14314)."""
        import torch

        settings = {"lr": self.optimiser_recipe.learning_rate, "weight_decay": self.optimiser_recipe.weight_decay}
        faster = {name for name in self.trained if LORA_B in name} if self.optimiser_recipe.lora_plus_ratio != 1 else set()
        groups = [
            {"params": [p for name, p in self.trained.items() if (name in faster) == fast], RATIO: ratio}
            for fast, ratio in ((False, 1.0), (True, self.optimiser_recipe.lora_plus_ratio))
        ]
        groups = [group for group in groups if group["params"]]
        if self.paged:
            from bitsandbytes.optim import PagedAdamW

            paged: torch.optim.Optimizer = PagedAdamW(groups, **settings)
            return paged
        return torch.optim.AdamW(groups, **settings)

    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value)
        return {name: t.contiguous() for name, t in tensors.items()}

    def _restore(self) -> int:
        """Load the newest checkpoint if there is one; return the number of finished steps."""
        import torch

        done, tensors = self.checkpoints.newest()
        with torch.no_grad():
            for name, p in self.trained.items() if done else ():
                p.copy_(tensors[f"weights.{name}"])
                moments = {key: tensors[f"{key}.{name}"] for key in (PAGED_MOMENTS if self.paged else MOMENTS)}
                self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
                if self.paged:
                    self.optimiser.state[p]["step"] = int(moments["step"])
        return done


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
    from pipelines import hardware

    return hardware.peak_resident_bytes()


def as_row(step: Step) -> dict[str, Any]:
    """Return a step as a row for metrics.jsonl."""
    return asdict(step)
