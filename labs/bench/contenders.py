"""One trainer of `llmlab bench tune`, alone in its process: python -m labs.bench.contenders NAME TASK.json

All learn the same rows with the same shape of adapter on the same base, eight rows a step. Each step is logged with the
seconds of training so far, and the adapter is kept at given times; what is done only for the measurement is not timed.

    trl_default  TRL's SFTTrainer as it comes; only mixed precision is off, since bfloat16 is far slower on most CPUs
    trl_tuned    the same without checkpointing, batches of similar length, a fitting learning rate with cosine decay
    plain        a loop over padded batches with transformers and torch alone
    ours         the trainer of this repository: packed trees, logits at labels only
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
import warnings
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import hardware
from pipelines.tune.packing import Encoded, encode
from pipelines.tune.recipe import Lora, Recipe, load_recipe
from pipelines.tune.rows import Row
from pipelines.tune.training import Step, learning_rate

if TYPE_CHECKING:
    import torch

STEPS_FILE = "steps.jsonl"
PROBE_STEPS = 4
TIME_USED = 0.97  # of the budget, by the plan of a schedule that has to end in time
SCHEDULE_POINTS = 1000
EPOCHS_THAT_NEVER_END = 50
NEVER = 10**6


@dataclass(frozen=True)
class Task:
    """What every contender is given.

    Attributes:
        model: folder of the base.
        rows: JSONL file of chats, `{"messages": [...]}`.
        target_modules: projections that get an adapter.
        out: folder for the log of steps and the adapters that are kept.
        seconds: of training.
        minute_marks: the adapter is kept after so many minutes, and at the end.
        step_mark: and after so many steps.
        recipe: the recipe of this repository; the other contenders take from it what they have a setting for.
    """

    model: str
    rows: str
    target_modules: list[str]
    out: str
    seconds: float
    minute_marks: list[float]
    step_mark: int
    recipe: str = "lora"

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def settings(self) -> Recipe:
        """Return the recipe, with the rows as its data and more epochs than there is time for."""
        given = {"data": self.rows, "held_out_share": 0, "schedule.steps": "null", "schedule.epochs": EPOCHS_THAT_NEVER_END,
                 "schedule.checkpoint_every_steps": NEVER}  # fmt: skip
        return load_recipe(self.recipe, [f"{field}={value}" for field, value in given.items()])

    def chats(self) -> list[Row]:
        """Return the rows."""
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        return [Row(tuple(json.loads(line)["messages"]), None, "") for line in lines]


class TimeIsUp(Exception):  # noqa: N818 - it ends a contender as planned
    """The seconds of the task are used up."""


class Clock:
    """Times the steps of a contender, logs them and keeps its adapter at the marks.

    Args:
        task: what is measured.
        save: writes the adapter as PEFT files into a folder.
    """

    def __init__(self, task: Task, save: Callable[[Path], None]) -> None:
        self.task, self.save, self.out = task, save, Path(task.out)
        self.marks = sorted(task.minute_marks)
        self.log = (self.out / STEPS_FILE).open("w", encoding="utf-8")
        self.steps, self.kept_at = 0, 0
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return time.perf_counter() - self.began

    @property
    def share(self) -> float:
        """Return the share of the budget that is used up."""
        return min(1.0, self.seconds / self.task.seconds)

    def step(self, loss: float, rows: int, tokens: int, supervised: int) -> None:
        """Note a finished step; `TimeIsUp` when it was the last."""
        self.steps += 1
        row = {"step": self.steps, "seconds": round(self.seconds, 3), "loss": loss, "rows": rows, "tokens": tokens,
               "supervised_tokens": supervised}  # fmt: skip
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        due = [m for m in self.marks if self.seconds >= 60 * m]
        if due or self.steps == self.task.step_mark or self.share >= 1:
            self.marks = self.marks[len(due) :]
            self.keep()
        if self.share >= 1:
            raise TimeIsUp

    def keep(self) -> None:
        """Keep the adapter as it is; that takes no time of the budget."""
        if self.kept_at == self.steps:
            return
        paused = time.perf_counter()
        self.save(self.out / f"step-{self.steps}")
        self.kept_at = self.steps
        self.began += time.perf_counter() - paused


def ours(task: Task) -> None:
    """Train with pipelines.tune; the first steps tell the speed, from which the number of steps is planned."""
    import tempfile

    import torch
    from transformers import AutoTokenizer

    from pipelines.tune import source
    from pipelines.tune.sft import Supervised
    from pipelines.tune.training import Training

    recipe = task.settings
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    steps = source.prepare(recipe, tokenizer).steps
    model = _with_adapter(task)
    clock = Clock(task, model.save_pretrained)
    objective = Supervised(tokenizer.pad_token_id)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def train(steps: Sequence[Any], on_step: Callable[[Step], None]) -> None:
        with tempfile.TemporaryDirectory() as checkpoints:
            Training(model, steps, recipe, objective, Path(checkpoints)).run(on_step)

    probed: list[Step] = []
    train(steps[:PROBE_STEPS], probed.append)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in fresh:
                p.copy_(fresh[name])
    speed = sum(s.tokens for s in probed[1:]) / sum(s.seconds for s in probed[1:])
    left = (task.seconds * TIME_USED - clock.seconds) * speed
    planned = max(1, bisect(list(accumulate(sum(len(p.tokens) for p in step) for step in steps)), left))
    try:
        train(steps[:planned], lambda s: clock.step(s.loss, s.rows, s.tokens, s.supervised_tokens))
    except TimeIsUp:
        return
    clock.keep()


def plain(task: Task) -> None:
    """Train in a loop over shuffled, padded batches; the learning rate follows the share of the time."""
    import torch
    from transformers import AutoTokenizer

    recipe = task.settings
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = [_shifted(encode(row, tokenizer)) for row in task.chats()]
    model = _with_adapter(task)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.optimiser.learning_rate, weight_decay=recipe.optimiser.weight_decay)
    clock = Clock(task, model.save_pretrained)
    model.train()
    for batch in _batches(rows, recipe.schedule.rows_per_step, recipe.schedule.seed):
        optimiser.param_groups[0]["lr"] = _rate(recipe, clock)
        loss = model(**_padded(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimiser.max_gradient_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        supervised = sum(label != -100 for _, labels in batch for label in labels)
        try:
            clock.step(float(loss.detach()), len(batch), sum(len(ids) for ids, _ in batch), supervised)
        except TimeIsUp:
            return


def trl_default(task: Task) -> None:
    """Train with SFTTrainer and its defaults."""
    _trl(task, tuned=False)


def trl_tuned(task: Task) -> None:
    """Train with SFTTrainer, set up for this machine and task."""
    _trl(task, tuned=True)


def _trl(task: Task, *, tuned: bool) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recipe = task.settings
    rows = Dataset.from_list([{"prompt": list(row.prompt), "completion": [row.messages[-1]]} for row in task.chats()])
    settings: dict[str, Any] = {"output_dir": task.out, "use_cpu": True, "bf16": False, "report_to": "none",
                                "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    optimisers: tuple[Any, Any] = (None, None)
    given: dict[str, Any] = {}
    clocks: list[Clock] = []
    if tuned:
        settings |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length", "logging_strategy": "no",
                     "num_train_epochs": EPOCHS_THAT_NEVER_END, "max_grad_norm": recipe.optimiser.max_gradient_norm}  # fmt: skip
        model = _with_adapter(task)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=recipe.optimiser.learning_rate, weight_decay=recipe.optimiser.weight_decay)
        peak = recipe.optimiser.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: _rate(recipe, clocks[0]) / peak if clocks else 1.0)
        optimisers = (optimiser, schedule)
    else:
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
        given["peft_config"] = _peft_config(task)
    seen = {"rows": 0, "tokens": 0, "supervised": 0}

    class Timed(TrainerCallback):  # type: ignore[misc]
        """Starts the clock with the first step and stops the trainer when time is up."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not clocks:
                clocks.append(Clock(task, lambda folder: trainer.model.save_pretrained(folder)))

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            counted = dict(seen)
            seen.update(dict.fromkeys(seen, 0))
            try:
                clocks[0].step(float("nan"), recipe.schedule.rows_per_step, counted["tokens"], counted["supervised"])
            except TimeIsUp:
                control.should_training_stop = True

    trainer = SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=rows, optimizers=optimisers, callbacks=[Timed()],
                         processing_class=AutoTokenizer.from_pretrained(task.model), **given)  # fmt: skip
    collate = trainer.data_collator

    def counting(features: Any) -> Any:
        batch = collate(features)
        seen["tokens"] += int(batch["attention_mask"].sum())
        seen["supervised"] += int((batch["labels"] != -100).sum())
        return batch

    trainer.data_collator = counting
    trainer.train()


def _with_adapter(task: Task) -> Any:
    import torch

    from pipelines.tune import adapter
    from pipelines.tune.finetune import load_base

    recipe = task.settings
    base = load_base(Path(task.model), "cpu", quantised=False)
    torch.manual_seed(recipe.schedule.seed)
    assert recipe.lora
    return adapter.attach(base, recipe.lora, task.target_modules, quantised=False)


def _peft_config(task: Task) -> Any:
    from peft import LoraConfig

    lora: Lora | None = task.settings.lora
    assert lora
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=task.target_modules,
                      task_type="CAUSAL_LM")  # fmt: skip


def _rate(recipe: Recipe, clock: Clock) -> float:
    return learning_rate(recipe.optimiser, round(clock.share * (SCHEDULE_POINTS - 1)), SCHEDULE_POINTS)


def _shifted(row: Encoded) -> tuple[list[int], list[int]]:
    """Return (ids, labels) as transformers takes them: a label stands at its own place, -100 where nothing is learnt."""
    assert row.labels[-1] is not None
    return [*row.tokens, row.labels[-1]], [-100, *(-100 if label is None else label for label in row.labels)]


def _batches(rows: Sequence[tuple[list[int], list[int]]], size: int, seed: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    drawn = random.Random(seed)
    while True:
        order = drawn.sample(rows, len(rows))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def _padded(batch: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    import torch

    length = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in batch]),
    }


CONTENDERS = {"trl_default": trl_default, "trl_tuned": trl_tuned, "plain": plain, "ours": ours}


def main(name: str, file: str) -> None:
    """Run a contender to the end of its time."""
    hardware.use_all_cores()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of other trainers, about their own parts
    CONTENDERS[name](Task(**json.loads(Path(file).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
