"""Groups of examples -> one token sequence each, with the shared passages computed once.

The prompts of a group differ only after their passages, so the longest common prefix of their tokens is laid down once
and each question with its answer is a branch: it sees the prefix and itself, and its positions go on from the prefix.
The logits at the labels are those of the examples taken one by one; a test compares them. Labels are the answer and the
end-of-turn token, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError, TrainingFailed
from pipelines.rag.answer import messages, reply_text
from pipelines.tune.data import Example

if TYPE_CHECKING:
    import torch

PREFIX = 0


@dataclass(frozen=True)
class Packed:
    """One group: `tokens`, `positions`, `branch` (0 for the prefix) and `labels` (None where nothing is predicted), all [T].

    `labels[i]` is the token that should follow at place `i`.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    labels: list[int | None]

    @property
    def supervised(self) -> int:
        """Return the number of predicted tokens."""
        return sum(label is not None for label in self.labels)


def encode(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return (prompt token ids, target token ids); the target ends with the end-of-turn token.

    Raises:
        TrainingFailed: the template does not lead from the prompt to the reply.
    """
    turns = messages(example.question, example.passages)
    reply = {
        "role": "assistant",
        "content": reply_text(example.answer or "", example.citations[0] if example.citations else None),
    }
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*turns, reply], return_dict=True)["input_ids"]
    if whole[: len(prompt)] != prompt:
        raise TrainingFailed("the chat template renders a prompt differently once it is answered", "a prefix of the whole chat")
    target = whole[len(prompt) :]
    end = tokenizer.eos_token_id
    if end not in target:
        raise TrainingFailed("the chat template puts no end-of-turn token after the reply: the model would never learn to stop",
                             f"token {end} ({tokenizer.eos_token})")  # fmt: skip
    return prompt, target[: target.index(end) + 1]


def pack(group: Sequence[Example], tokenizer: Any, max_tokens: int) -> Packed:
    """Lay a group down as one sequence.

    Raises:
        DataError: the group is longer than `max_tokens`; nothing is ever cut.
        TrainingFailed: a reply is not supervised up to its end.
    """
    encoded = [encode(example, tokenizer) for example in group]
    shared = _common_prefix([prompt[:-1] for prompt, _ in encoded])  # each branch keeps a token of its prompt to predict from
    packed = Packed(encoded[0][0][:shared], list(range(shared)), [PREFIX] * shared, [None] * shared)
    for number, (prompt, target) in enumerate(encoded, 1):
        own = prompt[shared:] + target[:-1]
        packed.tokens.extend(own)
        packed.positions.extend(range(shared, shared + len(own)))
        packed.branch.extend([number] * len(own))
        packed.labels.extend([None] * (len(own) - len(target)))
        packed.labels.extend(target)
    if len(packed.tokens) > max_tokens:
        raise DataError(f"a group of {len(group)} questions has {len(packed.tokens)} tokens", f"at most max_tokens={max_tokens}",
                        "raise schedule.max_tokens or lower schedule.questions_per_group with --set")  # fmt: skip
    return packed


def collate(batch: Sequence[Packed], pad_token: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Pad groups to one batch.

    Returns:
        input_ids [B, T], position_ids [B, T], attention_mask [B, 1, T, T] (True where a place may look),
        label_places [N] (flat places in B*T) and labels [N].
    """
    import torch

    length = max(len(p.tokens) for p in batch)
    ids = torch.full((len(batch), length), pad_token, device=device)
    positions = torch.zeros((len(batch), length), dtype=torch.long, device=device)
    branch = torch.full((len(batch), length), -1, device=device)
    places, labels = [], []
    for row, p in enumerate(batch):
        size = len(p.tokens)
        ids[row, :size] = torch.tensor(p.tokens)
        positions[row, :size] = torch.tensor(p.positions)
        branch[row, :size] = torch.tensor(p.branch)
        for place, label in enumerate(p.labels):
            if label is not None:
                places.append(row * length + place)
                labels.append(label)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": _branch_mask(branch),
            "label_places": torch.tensor(places, device=device), "labels": torch.tensor(labels, device=device)}  # fmt: skip


def _branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """Return [B, 1, T, T]: a place sees earlier places of the prefix and of its own branch, and always itself."""
    import torch

    length = branch.shape[1]
    seen, looking = branch[:, None, :], branch[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    same = (seen == looking) | (seen == PREFIX)
    return (same & causal)[:, None]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)
