"""Rows -> packed token sequences: a prompt that rows share is computed once, and nothing looks across rows.

Rows whose prompts begin alike form a tree: the longest common prefix of their tokens is laid down once and each row goes
on as a branch, which sees the prefix and itself, with positions that go on from the prefix. Trees are put together into
sequences of bounded length (best fit, longest first). The logits at the labels are those of the rows taken one by one; a
test compares them. Labels are the assistant's turns with their end-of-turn token, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError, TrainingFailed
from pipelines.tune.rows import Message, Row
from pipelines.tune.turns import end_of_turn, tokens_of

if TYPE_CHECKING:
    import torch

PREFIX = 0


@dataclass(frozen=True)
class Encoded:
    """A chat as token ids; `labels[i]` is the token that should follow place `i`, None where nothing is learnt. Both [T]."""

    tokens: list[int]
    labels: list[int | None]

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens before the first supervised one."""
        return next((i for i, label in enumerate(self.labels) if label is not None), len(self.labels) - 1) + 1

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens."""
        return sum(label is not None for label in self.labels)


@dataclass(frozen=True, eq=False)
class Packed:
    """One sequence; all lists are [T].

    Attributes:
        tree: number of the tree that a place belongs to.
        branch: number of the branch in the sequence, from 1; 0 in the prefix of a tree.
        labels: as in `Encoded`.
        rows: how many rows it holds.
    """

    tokens: list[int]
    positions: list[int]
    tree: list[int]
    branch: list[int]
    labels: list[int | None]
    rows: int = field(default=1)

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens."""
        return sum(label is not None for label in self.labels)


def encode(row: Row, tokenizer: Any) -> Encoded:
    """Return a row as tokens; every assistant turn is supervised up to its end-of-turn token, of plain text everything.

    Raises:
        TrainingFailed: the template does not lead from a prompt to its reply, or a reply has no supervised end.
    """
    if row.text is not None:
        return _encode_text(row.text, tokenizer, ends=row.ends)
    whole = _render(row.messages, tokenizer)
    tokens: list[int] = whole
    labels: list[int | None] = [None] * len(whole)
    last = len(whole)
    for turn, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(row.messages[:turn], tokenizer, reply_follows=True)
        upto = _render(row.messages[: turn + 1], tokenizer)
        if upto[: len(prompt)] != prompt:
            raise TrainingFailed(f"{_where(row)}the chat template renders a prompt differently once it is answered",
                                 "a prefix of the whole chat")  # fmt: skip
        end = _end_of_turn(upto[len(prompt) :], tokenizer, row) + len(prompt)
        if whole[: end + 1] != upto[: end + 1]:
            raise TrainingFailed(f"{_where(row)}the chat template renders an earlier turn differently once the chat goes on",
                                 "the same tokens in every turn")  # fmt: skip
        labels[len(prompt) - 1 : end] = upto[len(prompt) : end + 1]
        last = end
    return Encoded(tokens[:last], labels[:last])


def encode_pair(row: Row, tokenizer: Any) -> tuple[Encoded, Encoded]:
    """Return (chosen, rejected) of a preference row; only the last reply of each is supervised.

    Raises:
        DataError: the row has no rejected reply.
    """
    if row.rejected is None:
        raise DataError(f"{_where(row)}the row has no rejected reply", "preference rows: prompt, chosen, rejected",
                        "llmlab data report FILE shows what the file holds")  # fmt: skip
    both = []
    for reply in (row.reply, row.rejected):
        encoded = encode(Row((*row.messages[:-1], {"role": "assistant", "content": reply}), None, row.origin), tokenizer)
        prompt = len(_render(row.messages[:-1], tokenizer, reply_follows=True))
        silent: list[int | None] = [None] * (prompt - 1)
        both.append(Encoded(encoded.tokens, silent + encoded.labels[prompt - 1 :]))
    return both[0], both[1]


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """Return plain text as tokens, as its model saw text before: behind a begin-of-text token if the family has one.

    The names of special tokens in it are text like any other, so no document can end a turn.
    """
    ids = list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _encode_text(text: str, tokenizer: Any, *, ends: bool) -> Encoded:
    tokens = text_tokens(text, tokenizer)
    following: list[int | None] = [*tokens[1:], *([tokenizer.eos_token_id] if ends else [])]
    return Encoded(tokens[: len(following)], following)


def tree(rows: Sequence[Encoded]) -> Packed:
    """Lay rows down behind their longest common prefix."""
    limit = min(row.prompt_tokens - 1 for row in rows)  # each branch keeps a token of its prompt to predict from
    shared = min(common_prefix([row.tokens for row in rows]), limit)
    packed = Packed(rows[0].tokens[:shared], list(range(shared)), [0] * shared, [PREFIX] * shared, [None] * shared, len(rows))
    for number, row in enumerate(rows, 1):
        own = row.tokens[shared:]
        packed.tokens.extend(own)
        packed.positions.extend(range(shared, shared + len(own)))
        packed.tree.extend([0] * len(own))
        packed.branch.extend([number] * len(own))
        packed.labels.extend(row.labels[shared:])
    return packed


def families(rows: Sequence[Encoded], most: int) -> list[list[int]]:
    """Group rows whose prompts have at least half in common, `most` at most in a group; return their positions."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
    found: list[list[int]] = []
    for i in order:
        if found and len(found[-1]) < most:
            first = rows[found[-1][0]]
            shared = common_prefix([first.tokens, rows[i].tokens])
            if 2 * shared >= max(first.prompt_tokens, rows[i].prompt_tokens):
                found[-1].append(i)
                continue
        found.append([i])
    return found


def fit(trees: Iterable[Packed], max_tokens: int, join_up_to: int | None = None) -> list[Packed]:
    """Put trees together into as few sequences as best fit, longest first, finds.

    Args:
        trees: what is put together.
        max_tokens: the longest sequence that is allowed.
        join_up_to: the longest sequence that several trees may make, if it is less than `max_tokens`.

    Raises:
        DataError: a tree alone is longer than `max_tokens`; nothing is ever cut.
    """
    limit = min(max_tokens, join_up_to or max_tokens)
    bins: list[list[Packed]] = []
    room: list[int] = []
    for item in sorted(trees, key=lambda t: -len(t.tokens)):
        size = len(item.tokens)
        if size > max_tokens:
            raise DataError(f"{item.rows} rows with one prompt have {size} tokens", f"at most max_tokens={max_tokens}",
                            "raise schedule.max_tokens, or lower schedule.rows_per_prompt, with --set")  # fmt: skip
        best = min((b for b in range(len(bins)) if room[b] >= size), key=lambda b: room[b], default=None)
        if best is None:
            bins.append([])
            room.append(max(limit, size))
            best = len(bins) - 1
        bins[best].append(item)
        room[best] -= size
    return [join(items) for items in bins]


def join(trees: Sequence[Packed]) -> Packed:
    """Put sequences one behind the other; trees and branches are numbered through."""
    if len(trees) == 1:
        return trees[0]
    joined = Packed([], [], [], [], [], sum(t.rows for t in trees))
    for item in trees:
        first_tree = joined.tree[-1] + 1 if joined.tree else 0
        first_branch = max(joined.branch, default=0)
        joined.tokens.extend(item.tokens)
        joined.positions.extend(item.positions)
        joined.tree.extend(first_tree + t for t in item.tree)
        joined.branch.extend(b and b + first_branch for b in item.branch)
        joined.labels.extend(item.labels)
    return joined


def split(packed: Packed, rows: int) -> list[Packed]:
    """Take a sequence apart into trees of at most `rows` branches each, which see and predict what they did before.

    Loss and gradient stay the same; the prefix of a tree is computed once for each part.
    """
    parts = []
    for number in dict.fromkeys(packed.tree):
        places = [i for i, t in enumerate(packed.tree) if t == number]
        branches = list(dict.fromkeys(packed.branch[i] for i in places if packed.branch[i] != PREFIX))
        for first in range(0, len(branches), rows):
            own = {PREFIX: PREFIX} | {branch: n for n, branch in enumerate(branches[first : first + rows], 1)}
            kept = [i for i in places if packed.branch[i] in own]
            tokens, positions = [packed.tokens[i] for i in kept], [packed.positions[i] for i in kept]
            branch, labels = [own[packed.branch[i]] for i in kept], [packed.labels[i] for i in kept]
            parts.append(Packed(tokens, positions, [0] * len(kept), branch, labels, len(own) - 1))
    return parts


def collate(batch: Sequence[Packed], pad_token: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Pad sequences to one batch.

    Returns:
        input_ids [B, T], position_ids [B, T], attention_mask [B, 1, T, T] (True where a place may look),
        label_places [N] (flat places in B*T), labels [N], and label_rows [N]: which row of the batch a label belongs to.
    """
    import torch

    length = max(len(p.tokens) for p in batch)
    ids = torch.full((len(batch), length), pad_token, device=device)
    positions = torch.zeros((len(batch), length), dtype=torch.long, device=device)
    trees = torch.full((len(batch), length), -1, device=device)
    branch = torch.full((len(batch), length), -1, device=device)
    places, labels, rows = [], [], []
    first_row = 0
    for number, p in enumerate(batch):
        size = len(p.tokens)
        ids[number, :size] = torch.tensor(p.tokens)
        positions[number, :size] = torch.tensor(p.positions)
        trees[number, :size] = torch.tensor(p.tree)
        branch[number, :size] = torch.tensor(p.branch)
        for place, label in enumerate(p.labels):
            if label is not None:
                places.append(number * length + place)
                labels.append(label)
                rows.append(first_row + p.branch[place] - 1)
        first_row += p.rows
    return {"input_ids": ids, "position_ids": positions, "attention_mask": _mask(trees, branch),
            "label_places": torch.tensor(places, device=device), "labels": torch.tensor(labels, device=device),
            "label_rows": torch.tensor(rows, device=device)}  # fmt: skip


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with alike."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)


def _mask(trees: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Return [B, 1, T, T]: a place sees earlier places of its tree's prefix and of its own branch, and always itself."""
    import torch

    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    same_tree = trees[:, None, :] == trees[:, :, None]
    reachable = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == PREFIX)
    return (same_tree & reachable & causal)[:, None]


def _render(messages: Sequence[Message], tokenizer: Any, *, reply_follows: bool = False) -> list[int]:
    return tokens_of(tokenizer, messages, reply_follows=reply_follows)


def _end_of_turn(reply: Sequence[int], tokenizer: Any, row: Row) -> int:
    """Return the place of the end-of-turn token in a rendered reply."""
    end = end_of_turn(tokenizer)
    if end not in reply:
        raise TrainingFailed(f"{_where(row)}the chat template puts no end-of-turn token after the reply: the model would never "
                             "learn to stop", f"token {end} ({tokenizer.convert_ids_to_tokens(end)})")  # fmt: skip
    return list(reply).index(end)


def _where(row: Row) -> str:
    return f"{row.origin}: " if row.origin else ""
