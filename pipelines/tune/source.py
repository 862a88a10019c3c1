"""From what a recipe calls its data to the steps of a training: rows -> tokens -> packed sequences -> steps.

Data is a generated instruction set (a name in configs/data), a file of rows, or a folder of documents. Of a file a part is held
out, by the hash of how its prompts begin, so that questions about one text never stand on both sides; of a folder whole
documents. Nothing here knows about models or optimisers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import names, unknown
from pipelines.errors import ConfigError, DataError, TrainingFailed
from pipelines.tune import data
from pipelines.tune.documents import folder_sha256, read_documents
from pipelines.tune.files import read_rows
from pipelines.tune.groups import training_groups
from pipelines.tune.packing import Encoded, Packed, encode, encode_pair, families, fit, join, tree
from pipelines.tune.recipe import Recipe, Schedule
from pipelines.tune.report import check_overlap
from pipelines.tune.rows import Row

HELD_OUT_ROWS = 48  # at most, of a file
HELD_OUT_EXAMPLES = 12  # of the generated instruction set, whose held-out part has an evaluation of its own
FEWEST_ROWS_TO_HOLD_OUT = 40
PROMPT_BEGINS = 200  # characters
# Attention looks at every place of a sequence, also at those of other trees that the mask then hides. On a CPU matrix products
# are at full speed from about 300 rows, so longer sequences only cost: 20 % of the time at 550 tokens, half of it at 300.
JOIN_UP_TO_ON_CPU = 320

Step = list[Packed]


@dataclass(frozen=True)
class Prepared:
    """What a training runs on.

    Attributes:
        steps: for each optimiser step the packed sequences that it learns from.
        held_out: rows that are never learnt, for the proof afterwards; may be empty.
        rows: how many rows all steps together hold.
        sha256: fingerprint of every token that is learnt from, in order.
        notes: what a user should know about the data, in lines.
    """

    steps: list[Step]
    held_out: list[Row]
    rows: int
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens of all steps."""
        return sum(p.supervised for step in self.steps for p in step)


def is_file(name: str) -> bool:
    """Return True if a recipe's `data` names a file or folder and not a generated instruction set."""
    return name not in names("data")


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return everything that decides the training data, for the configuration of a run.

    Raises:
        ConfigError: the data is neither a file nor a known instruction set.
    """
    if not is_file(recipe.data):
        return data.resolved(data.load_reader(recipe.data))
    files = {"file": recipe.data} | ({"evaluation": recipe.evaluation} if recipe.evaluation else {})
    return {part: _fingerprint(_path(name)) for part, name in files.items()}


def check(recipe: Recipe) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        ConfigError: the data is neither a file, a folder nor a known instruction set; or preferences from a folder.
    """
    if is_file(recipe.data) and _path(recipe.data).is_dir() and recipe.method == "dpo":
        raise ConfigError(f"{recipe.data} is a folder of documents, and dpo learns from preferences",
                          "a file of rows with prompt, chosen, rejected",
                          f"llmlab finetune --recipe lora --data {recipe.data} --epochs 3")  # fmt: skip


def prepare(recipe: Recipe, tokenizer: Any, device: str = "cpu", *, shared: bool = True) -> Prepared:
    """Return the steps of a recipe.

    Args:
        recipe: what is learnt, and how it is cut into steps.
        tokenizer: of the model, with its chat template.
        device: "cpu" or "cuda".
        shared: rows may share the computation of their prompt, since the model is told positions.

    Raises:
        ConfigError: epochs of a generated instruction set.
        DataError: a file that cannot be read as rows, or a row that is longer than max_tokens.
        TrainingFailed: a row without a supervised token, or a template that leaves a reply without its end.
    """
    if recipe.schedule.steps is None and not is_file(recipe.data):
        raise ConfigError(f"the instruction set {recipe.data} has no end, so it has no epochs", "schedule.steps",
                          "--set schedule.epochs=null --set schedule.steps=250")  # fmt: skip
    if not shared:
        alone = recipe.schedule.model_copy(update={"rows_per_prompt": 1})
        recipe = recipe.model_copy(update={"schedule": alone})
    join_up_to = JOIN_UP_TO_ON_CPU if device == "cpu" else recipe.schedule.max_tokens
    if recipe.method == "dpo":
        pairs = _preference_rows(recipe)
        kept, held_out = _divided(recipe, pairs, tokenizer) if is_file(recipe.data) else (pairs, _held_out_examples(recipe))
        trees = [_pair_tree(row, tokenizer, shared=shared) for row in kept]
        return _prepared(_steps(trees, recipe.schedule, join_up_to, rows_in_one=2), held_out)
    if not is_file(recipe.data):
        steps = _generated(recipe, tokenizer, join_up_to)
        return _prepared(steps, _held_out_examples(recipe))
    read, notes = _read(recipe, recipe.data, tokenizer)
    rows, held_out = _divided(recipe, read, tokenizer)
    encoded = [_learnable(encode(row, tokenizer), row) for row in rows]
    texts = any(row.text is not None for row in rows)  # which have no prompt to share
    groups = [[i] for i in range(len(rows))] if texts else families(encoded, recipe.schedule.rows_per_prompt)
    steps = _steps([tree([encoded[i] for i in group]) for group in groups], recipe.schedule, join_up_to)
    return _prepared(steps, held_out, notes)


def _read(recipe: Recipe, name: str, tokenizer: Any) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a file or of a folder, and what is to be said about them."""
    path = _path(name)
    if not path.is_dir():
        return read_rows(path), ()
    found = read_documents(path, tokenizer, recipe.schedule.max_tokens)
    return found.rows, (found.note(name),)


def _generated(recipe: Recipe, tokenizer: Any, join_up_to: int) -> list[Step]:
    """Draw as many groups as the steps take; each group shares its passages and is a tree of its own."""
    s = recipe.schedule
    assert s.steps is not None  # a generated set has no epochs
    config = data.load_reader(recipe.data)
    corpus, _ = data.corpora(config)
    per_step = -(-s.rows_per_step // s.rows_per_prompt)
    groups = training_groups(config, corpus, s.steps * per_step, min(s.rows_per_prompt, s.rows_per_step), s.seed)
    trees = [tree([encode(e.row, tokenizer) for e in group]) for group in groups]
    return [fit(trees[i : i + per_step], s.max_tokens, join_up_to) for i in range(0, len(trees), per_step)]


def _held_out_examples(recipe: Recipe) -> list[Row]:
    config = data.load_reader(recipe.data)
    _, corpus = data.corpora(config)
    return [e.row for e in data.held_out_examples(config, corpus, HELD_OUT_EXAMPLES)]


def _steps(trees: Sequence[Packed], schedule: Schedule, join_up_to: int, rows_in_one: int = 1) -> list[Step]:
    """Shuffle the trees anew for each epoch and cut them into steps of about `rows_per_step` rows (or pairs)."""
    steps: list[Step] = []
    epoch = 0
    while not _enough(steps, epoch, schedule):
        order = list(trees)
        random.Random(schedule.seed + epoch).shuffle(order)
        steps += [fit(chosen, schedule.max_tokens, join_up_to) for chosen in _cut(order, rows_in_one * schedule.rows_per_step)]
        epoch += 1
        if schedule.epochs is not None and epoch == 1:
            wanted = max(1, round(schedule.epochs * len(steps)))
    return steps[: schedule.steps if schedule.steps is not None else wanted]


def _enough(steps: Sequence[Step], epochs: int, schedule: Schedule) -> bool:
    if schedule.steps is not None:
        return len(steps) >= schedule.steps
    return epochs >= (schedule.epochs or 0)


def _cut(trees: Sequence[Packed], rows_per_step: int) -> list[list[Packed]]:
    """Fill each step up to `rows_per_step` rows; a tree is not split, and what is left over makes a smaller step."""
    cut: list[list[Packed]] = [[]]
    for item in trees:
        if cut[-1] and sum(t.rows for t in cut[-1]) + item.rows > rows_per_step:
            cut.append([])
        cut[-1].append(item)
    return cut


def _preference_rows(recipe: Recipe) -> list[Row]:
    if is_file(recipe.data):
        return read_rows(_path(recipe.data))
    from pipelines.tune.preference import reader_pairs

    return reader_pairs(recipe)


def _pair_tree(row: Row, tokenizer: Any, *, shared: bool) -> Packed:
    chosen, rejected = encode_pair(row, tokenizer)
    if chosen.tokens == rejected.tokens and chosen.labels == rejected.labels:
        raise DataError(f"{row.origin}: chosen and rejected are the same", "two different replies", "remove the row")
    return tree([chosen, rejected]) if shared else join([tree([chosen]), tree([rejected])])


def _learnable(encoded: Encoded, row: Row) -> Encoded:
    if not encoded.supervised:
        raise TrainingFailed(f"{row.origin}: the row has no supervised token", "an assistant turn with text",
                             "llmlab data report FILE shows the mask of each row")  # fmt: skip
    return encoded


def _divided(recipe: Recipe, rows: Sequence[Row], tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Return (rows to learn, rows held out): those of the evaluation file, or a share of the rows.

    Raises:
        DataError: a row of the evaluation file is among those to learn, and the recipe does not allow that.
    """
    if recipe.evaluation is None:
        return _hold_out(rows, recipe.held_out_share)
    evaluation, _ = _read(recipe, recipe.evaluation, tokenizer)
    check_overlap(rows, evaluation, allowed=recipe.allow_overlap)
    return list(rows), evaluation


def _hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return (rows to learn, rows held out); small files are learnt whole."""
    if len(rows) < FEWEST_ROWS_TO_HOLD_OUT:
        return list(rows), []
    limit = min(HELD_OUT_ROWS, round(len(rows) * share))
    ranked = sorted({_group_hash(row) for row in rows})
    chosen: set[str] = set()
    count = 0
    of = _counts(rows, _group_hash)
    for digest in ranked:
        if count + of[digest] > limit:
            continue
        chosen.add(digest)
        count += of[digest]
    kept = [row for row in rows if _group_hash(row) not in chosen]
    return kept, [row for row in rows if _group_hash(row) in chosen]


def _counts(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[key(row)] = counts.get(key(row), 0) + 1
    return counts


def _group_hash(row: Row) -> str:
    """Return the hash of a row's group, or of how its prompt begins: questions about one text stay on one side."""
    return hashlib.sha256((row.group or json.dumps(row.prompt, sort_keys=True)[:PROMPT_BEGINS]).encode()).hexdigest()


def _prepared(steps: list[Step], held_out: list[Row], notes: tuple[str, ...] = ()) -> Prepared:
    if not any(p.supervised for step in steps for p in step):
        raise TrainingFailed("the data has no supervised token: there is nothing to learn", "answers that survive the template")
    digest = hashlib.sha256(json.dumps([[p.tokens for p in step] for step in steps]).encode()).hexdigest()
    return Prepared(steps, held_out, sum(p.rows for step in steps for p in step), digest, notes)


def _fingerprint(path: Path) -> dict[str, str]:
    if path.is_dir():
        return {"name": path.resolve().name, "sha256": folder_sha256(path)}
    with path.open("rb") as stream:
        return {"name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file() and not path.is_dir():
        raise unknown("instruction set (and no file or folder)", name, names("data"))
    return path
