"""The objective of supervised fine-tuning: the negative log-likelihood of the labels.

Logits are computed at labels only, since the output layer is a fifth of a small model's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.architecture import decoder_of
from pipelines.tune import masks
from pipelines.tune.packing import Packed, collate

if TYPE_CHECKING:
    import torch


class Supervised:
    """Mean negative log-likelihood of a supervised token, in nats."""

    divisible = True

    def __init__(self, pad_token: int) -> None:
        self.pad_token = pad_token

    def count(self, sequences: Sequence[Packed]) -> int:
        """Return over how many terms the loss of these sequences is a mean."""
        return sum(p.supervised for p in sequences)

    def total(self, model: Any, sequences: Sequence[Packed]) -> torch.Tensor:
        """Return the summed loss of some sequences, a scalar in nats."""
        return label_loss(model, collate(sequences, self.pad_token, next(model.parameters()).device.type))


def label_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed negative log-likelihood of the labels of a collated batch, a scalar in nats."""
    import torch

    return torch.nn.functional.cross_entropy(label_logits(model, batch).float(), batch["labels"], reduction="sum")


def label_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits at the labelled places only, [N, vocabulary]."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = causal.config.get_text_config()
    seen = masks.of_layers(batch["attention_mask"], batch["position_ids"], text, next(causal.parameters()).dtype)
    hidden = decoder_of(causal)(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=seen, use_cache=False
    ).last_hidden_state
    logits = causal.get_output_embeddings()(hidden.flatten(0, 1)[batch["label_places"]])
    scale, cap = getattr(text, "logit_scale", None), getattr(text, "final_logit_softcapping", None)
    logits = logits if scale is None else logits * scale
    return logits if cap is None else cap * (logits / cap).tanh()


def mean_loss(model: Any, sequences: Sequence[Packed], pad_token: int) -> float:
    """Return the mean loss of some sequences without training on them, in nats per supervised token."""
    import torch

    objective = Supervised(pad_token)
    with torch.no_grad():  # inference mode would leave its mark on the shared layers of a sharded model
        return sum(float(objective.total(model, [p])) for p in sequences) / max(1, objective.count(sequences))
