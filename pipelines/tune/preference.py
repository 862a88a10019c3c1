"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), from the adapter of a supervised run.

The reference is the model as that run left it. Its log-probabilities are computed once, before the first step, and kept in
the run; the loss of the first step must be ln 2, or the reference is another model than the one that is tuned. A pair is a
tree of two branches, so the prompt of chosen and rejected is computed once.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import TrainingFailed
from pipelines.rag.answer import ABSTENTION, reply_text
from pipelines.runs import write_text
from pipelines.tune import data
from pipelines.tune.groups import training_groups
from pipelines.tune.packing import Packed, collate
from pipelines.tune.recipe import Recipe
from pipelines.tune.rows import Row
from pipelines.tune.sft import label_logits

if TYPE_CHECKING:
    import torch

FIRST_LOSS_TOLERANCE = 1e-3
REFERENCE_FILE = "reference.json"


class Preferences:
    """The DPO loss of a pair: -log sigmoid(beta * (margin of the policy - margin of the reference)), in nats.

    Args:
        model: the policy before its first step, which is the reference.
        steps: every sequence that will be trained on; each holds whole pairs (chosen, then rejected).
        beta: how strongly the policy is held to the reference.
        pad_token: token id that fills short sequences.
        kept: file of the reference's log-probabilities; read if it is there.
    """

    divisible = False  # a reference belongs to a whole sequence

    def __init__(self, model: Any, steps: Sequence[Sequence[Packed]], beta: float, pad_token: int, kept: Path) -> None:
        self.beta, self.pad_token = beta, pad_token
        sequences = list(dict.fromkeys(p for step in steps for p in step))
        if not kept.is_file():
            write_text(kept, json.dumps([self._reference(model, p) for p in sequences]))
        self.reference = dict(zip(sequences, json.loads(kept.read_text(encoding="utf-8")), strict=True))

    def count(self, sequences: Sequence[Packed]) -> int:
        """Return the number of pairs."""
        return sum(p.rows for p in sequences) // 2

    def total(self, model: Any, sequences: Sequence[Packed]) -> torch.Tensor:
        """Return the summed loss of the pairs, a scalar in nats."""
        import torch

        policy = log_probabilities(model, sequences, self.pad_token).view(-1, 2)
        reference = torch.tensor([x for p in sequences for x in self.reference[p]], device=policy.device).view(-1, 2)
        margins = (policy - reference).diff(dim=1).neg()  # chosen - rejected
        return -torch.nn.functional.logsigmoid(self.beta * margins).sum()

    def _reference(self, model: Any, sequence: Packed) -> list[float]:
        import torch

        model.eval()
        with torch.inference_mode():
            return [float(x) for x in log_probabilities(model, [sequence], self.pad_token)]


def log_probabilities(model: Any, sequences: Sequence[Packed], pad_token: int) -> torch.Tensor:
    """Return the summed log-probability of the labels of each row, [rows], in nats."""
    import torch

    batch = collate(sequences, pad_token, next(model.parameters()).device.type)
    losses = torch.nn.functional.cross_entropy(label_logits(model, batch).float(), batch["labels"], reduction="none")
    rows = sum(p.rows for p in sequences)
    return torch.zeros(rows, device=losses.device).index_add(0, batch["label_rows"], -losses)


def check_first_loss(loss: float) -> None:
    """Raise `TrainingFailed` unless the loss before any update is ln 2, as it is when policy and reference are the same."""
    if abs(loss - math.log(2)) > FIRST_LOSS_TOLERANCE:
        raise TrainingFailed(f"the first DPO loss is {loss:.4f}: the reference is not the model that is tuned",
                             f"ln 2 = {math.log(2):.4f}", "llmlab runs, and name the run to start from with --start")  # fmt: skip


def reader_pairs(recipe: Recipe) -> list[Row]:
    """Return preferences about the reader's instruction set, as many as the steps take: cite and abstain, or do not.

    What is rejected is what a careless reader writes: it abstains though a passage holds the answer, cites another
    passage, or answers a question that the passages leave open with a value that stands in one of them.
    """
    s = recipe.schedule
    assert s.steps is not None  # a generated set has no epochs
    config = data.load_reader(recipe.data)
    corpus, _ = data.corpora(config)
    rng = random.Random(s.seed)
    pairs: list[Row] = []
    for group in training_groups(config, corpus, s.steps * s.rows_per_step, 4, s.seed):
        for example in group:
            rejected = _careless(example, group, rng)
            if rejected and rejected != example.reply:
                pairs.append(Row(example.row.messages, rejected, f"{recipe.data}:{len(pairs) + 1}"))
        if len(pairs) >= s.steps * s.rows_per_step:
            break
    return pairs[: s.steps * s.rows_per_step]


def _careless(example: data.Example, group: Sequence[data.Example], rng: random.Random) -> str:
    """Return a wrong reply to an example, or "" if the group offers none."""
    if example.answer is None:
        others = [e for e in group if e.answer is not None]
        return rng.choice(others).reply if others else ""
    wrong = [n for n in range(1, len(example.passages) + 1) if n not in example.citations]
    miscited = reply_text(example.answer, rng.choice(wrong)) if wrong else ABSTENTION
    return rng.choice([ABSTENTION, miscited])
