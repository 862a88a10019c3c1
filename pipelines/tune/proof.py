"""The proof card of a run: that tuning did something, what it cost elsewhere, and who can serve the result.

The same measurements are taken before the first step and after the last: loss on held-out rows, and, for what was
forgotten, loss on a fixed general sample and on worked arithmetic (configs/proof/general.yaml). A run whose adapter changes
no logit fails; everything else is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import Config, load, named
from pipelines.errors import TrainingFailed
from pipelines.tune import template
from pipelines.tune.packing import Encoded, Packed, encode, families, fit, tree
from pipelines.tune.rows import Row
from pipelines.tune.sft import mean_loss
from pipelines.tune.turns import end_of_turn, tokens_of

if TYPE_CHECKING:
    import torch

CARD_FILE = "proof.json"
MIN_LOGIT_CHANGE = 1e-3
STOP_PROMPTS = 8
STOP_TOKENS = 48
ROWS_PER_TREE, JOIN_UP_TO = 8, 320  # rows that share a prompt, tokens of a sequence
MAX_PROBE_TOKENS = 2048  # of held-out rows; more would take longer than it tells


class General(Config):
    """The fixed sample: (question, answer) of general knowledge and of worked arithmetic."""

    general: list[list[str]]
    arithmetic: list[list[str]]


@dataclass(frozen=True)
class Measured:
    """The state of a model; losses in nats per supervised token, `logits` [chats, vocabulary] after the golden chats."""

    losses: dict[str, float]
    logits: torch.Tensor


class Probe:
    """Measures a model on rows that it does not learn from; the same rows before and after."""

    def __init__(self, tokenizer: Any, held_out: Sequence[Row]) -> None:
        fixed = load(named("proof", "general"), General)
        self.tokenizer, self.held_out = tokenizer, list(held_out)
        self.sequences = {
            "general": _packed([encode(_row(*pair), tokenizer) for pair in fixed.general]),
            "arithmetic": _packed([encode(_row(*pair), tokenizer) for pair in fixed.arithmetic]),
        }
        if held_out:
            shown = _up_to(MAX_PROBE_TOKENS, [encode(row, tokenizer) for row in held_out])
            self.sequences = {"held_out": _packed(shown)} | self.sequences
        self.golden = [golden["token_ids"] for golden in template.lock(tokenizer)["golden"]]

    def measure(self, model: Any) -> Measured:
        """Return losses and logits of the model as it is now."""
        import torch

        model.eval()
        losses = {name: mean_loss(model, rows, self.tokenizer.pad_token_id) for name, rows in self.sequences.items()}
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1]
                      for ids in self.golden]  # fmt: skip
        return Measured(losses, torch.stack(logits).float().cpu())

    def before(self, model: Any, kept: Path) -> Measured:
        """Return `measure(model)`, kept in a file so that a resumed training compares with the same beginning."""
        import torch
        from safetensors.torch import load_file, save_file

        if not kept.is_file():
            now = self.measure(model)
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(kept.name + ".tmp")
            values = {f"loss.{name}": torch.tensor(loss, dtype=torch.float64) for name, loss in now.losses.items()}
            save_file(values | {"logits": now.logits}, temporary)
            temporary.replace(kept)
        tensors = load_file(kept)
        logits = tensors.pop("logits")
        return Measured({name.removeprefix("loss."): float(value) for name, value in tensors.items()}, logits)

    def stop_rate(self, model: Any) -> float:
        """Return the share of greedy replies that end by themselves within `STOP_TOKENS` tokens."""
        import torch

        asked = [row for row in self.held_out if row.text is None]
        rows = (asked or [_row(q, a) for q, a in load(named("proof", "general"), General).general])[:STOP_PROMPTS]
        chats = [tokens_of(self.tokenizer, r.prompt, reply_follows=True) for r in rows]
        end = end_of_turn(self.tokenizer)
        batch = self.tokenizer.pad({"input_ids": chats}, return_tensors="pt", padding_side="left").to(model.device)
        model.eval()
        with _merged(model), torch.no_grad():
            made = model.generate(**batch, max_new_tokens=STOP_TOKENS, do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
                                  eos_token_id=end)  # fmt: skip
        ended = (made[:, batch["input_ids"].shape[1] :] == end).any(dim=1)
        return float(ended.float().mean())


@contextmanager
def _merged(model: Any) -> Iterator[None]:
    """Put the adapter into the base for the block, for DoRA computes its whole weights for each token otherwise.

    A base in 4 bits, or spread over processes, stays as it is.
    """
    from torch.distributed.tensor import DTensor

    spread = any(isinstance(p, DTensor) for p in model.parameters())
    if spread or not hasattr(model, "merge_adapter") or getattr(model, "is_loaded_in_4bit", False):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def card(before: Measured, after: Measured, stop_rate: float, servable: dict[str, str]) -> dict[str, Any]:
    """Return the proof card.

    Args:
        before: measured before the first step.
        after: measured after the last.
        stop_rate: share of replies that end by themselves.
        servable: for each engine "yes", or the reason why not.

    Raises:
        TrainingFailed: no logit changed by more than `MIN_LOGIT_CHANGE`.
    """
    change = float((after.logits - before.logits).abs().max())
    if not change >= MIN_LOGIT_CHANGE:
        raise TrainingFailed(f"tuning changes no logit by more than {change:.1e}", f"at least {MIN_LOGIT_CHANGE}",
                             "raise schedule.steps or optimiser.learning_rate with --set")  # fmt: skip
    losses = {
        f"{name}_loss": {"before": round(before.losses[name], 4), "after": round(loss, 4)} for name, loss in after.losses.items()
    }
    return {"logit_change": round(change, 4), "stop_rate": round(stop_rate, 3), **losses, "servable": servable}


def _row(question: str, answer: str) -> Row:
    return Row(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _packed(rows: Sequence[Encoded]) -> list[Packed]:
    """Share what prompts have in common, and join what is short."""
    trees = [tree([rows[i] for i in group]) for group in families(rows, ROWS_PER_TREE)]
    return fit(trees, max(JOIN_UP_TO, *(len(item.tokens) for item in trees)), JOIN_UP_TO)


def _up_to(tokens: int, rows: Sequence[Encoded]) -> list[Encoded]:
    taken: list[Encoded] = []
    for row in rows:
        tokens -= len(row.tokens)
        if taken and tokens < 0:
            break
        taken.append(row)
    return taken
