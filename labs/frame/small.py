"""Small models of a true architecture, taught from nothing on real text in seconds or minutes, for labs that look at a mechanism.

Architecture, tokenizer and template are the catalogue's; only sizes are smaller. What such a model writes means little; how its
loss depends on what a lab changes is real. Tuning of models that are used goes through pipelines.tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.architecture import loader
from pipelines.catalogue import runnable
from pipelines.tune.rehearsal import shrunk_config, train_tokenizer

if TYPE_CHECKING:
    import torch

SEED = 5
WARMUP_STEPS = 20
LOSS_ROWS = 16

Say = Callable[[str], object]


@dataclass(frozen=True)
class Small:
    """A model in memory with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """Return how many numbers it has; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())


def make(name: str, texts: Iterable[str], tokenizer: Any = None, **sizes: Any) -> Small:
    """Return a model of a catalogue entry's architecture with random weights.

    Args:
        name: a runnable catalogue entry.
        texts: what the tokenizer is trained on; without any, its tokens are bytes, which a small model learns soonest.
        tokenizer: one to take in place of that.
        sizes: fields of its configuration over those of the rehearsal; of `text_config`, if the entry has one.
    """
    import torch

    entry = runnable(name)
    assert entry.rehearsal and entry.config  # runnable
    over: dict[str, Any] = dict(entry.rehearsal.config)
    inner = over.get("text_config")
    over |= {"text_config": {**inner, **sizes}} if isinstance(inner, dict) else sizes
    entry = entry.model_copy(update={"rehearsal": entry.rehearsal.model_copy(update={"config": over})})
    tokenizer = tokenizer or train_tokenizer(entry, texts)
    torch.manual_seed(SEED)
    config = shrunk_config(entry, tokenizer)
    return Small(loader(config).from_config(config).train(), tokenizer)


def blocks(texts: Sequence[str], tokenizer: Any, length: int) -> torch.Tensor:
    """Return texts, one behind the other, as token ids [n, length + 1]; the last column is only predicted."""
    import torch

    end = [tokenizer.eos_token_id]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end]
    whole = (len(ids) - 1) // length
    return torch.stack([torch.tensor(ids[i * length : (i + 1) * length + 1]) for i in range(whole)])


def teach(model: Any, rows: torch.Tensor, steps: int, *, batch: int, rate: float, seed: int = SEED,
          say: Say = lambda _: None) -> list[float]:  # fmt: skip
    """Train what requires a gradient by AdamW, warm-up and cosine decay; return the loss of each step, in nats per token.

    Args:
        model: a causal language model, with an adapter or without.
        rows: token ids [n, length + 1]; drawn without repeating a row before all were drawn.
        steps: of the optimiser.
        batch: rows of a step.
        rate: the highest learning rate.
        seed: of the drawing.
        say: is told the loss now and then.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    generator, order, losses = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), list[float]()
    model.train()
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        chosen, order = rows[order[:batch]], order[batch:]
        for group in optimiser.param_groups:
            group["lr"] = rate * _share(step, steps)
        loss = _token_losses(model, chosen).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 4) == 0:
            say(f"step {step + 1}/{steps}: loss {losses[-1]:.2f}")
    return losses


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token of some rows, [n, length], in nats, without training."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([_token_losses(model, part) for part in rows.split(LOSS_ROWS)])


def _token_losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    import torch

    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(
        len(rows), -1)  # fmt: skip


def _share(step: int, steps: int) -> float:
    """Return the share of the highest rate: linear warm-up, then a cosine to zero."""
    warmup = min(WARMUP_STEPS, max(1, steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
