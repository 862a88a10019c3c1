"""The tuning job: plan -> weights -> data -> train -> prove -> export -> run. `make finetune MODEL=... RECIPE=...`

Decides once whether the model is tuned or only rehearsed, and says why. It prints nothing itself: a `Watcher` is told
what happens.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines import catalogue, hardware, weights
from pipelines.catalogue import Model
from pipelines.errors import PlanDoesNotFit, Rehearsed, WeightsMissing
from pipelines.plan import Plan, make_plan
from pipelines.runs import Draft, Run, draft, write_text
from pipelines.tune import adapter, data, rehearsal, template
from pipelines.tune.groups import training_groups
from pipelines.tune.packing import Packed, pack
from pipelines.tune.recipe import Recipe, load_recipe
from pipelines.tune.sft import Step, Training, as_row

KIND = "finetune"
METRICS = "metrics.jsonl"
REHEARSAL_STEPS = 6


class Watcher(Protocol):
    """Who follows the job."""

    def say(self, text: str) -> None:
        """Take one line for the user."""

    def plan(self, plan: Plan) -> None:
        """Take the plan, before anything is loaded."""

    def step(self, step: Step) -> None:
        """Take the figures of an optimiser step."""


@dataclass(frozen=True)
class Job:
    """What the user asked for; `recipe` None means the model's own."""

    model: str
    recipe: str | None = None
    overrides: Sequence[str] = ()
    rehearse: bool = False
    pull: bool = True


def finetune(job: Job, watcher: Watcher) -> Run:
    """Tune a model and return the finished run; with `job.rehearse`, rehearse it.

    Raises:
        UnknownName, ConfigError: the model or recipe does not exist or does not fit its schema.
        Rehearsed: the weights are not to be had or the plan does not fit; the rehearsal was done instead, and says so.
        TrainingFailed: the result must not be used.
    """
    entry = catalogue.runnable(job.model)
    recipe_name = job.recipe or entry.default_recipe
    recipe = load_recipe(recipe_name, job.overrides)
    device = hardware.choose_device()
    watcher.say(f"device: {device.choice} ({device.reason}); recipe: {recipe_name}")
    plan = make_plan(entry, recipe, hardware.probe(weights.model_cache()), device.choice, on_disk=weights.is_here(entry))
    watcher.plan(plan)
    if job.rehearse:
        return _rehearse(entry, recipe, recipe_name, watcher)
    try:
        plan.check()
        folder = weights.obtain(entry, pull=job.pull, say=watcher.say)
    except (PlanDoesNotFit, WeightsMissing) as problem:
        watcher.say(f"{problem}\nrehearsing instead: {entry.name}'s architecture, shrunk, with random weights")
        run = _rehearse(entry, recipe, recipe_name, watcher)
        raise Rehearsed(f"{entry.name} was rehearsed, not tuned (run {run.id}): {problem.came}", problem.expected,
                        f"{problem.next_command}; or make finetune MODEL=smollm2-135m") from None  # fmt: skip
    config = _config(entry, recipe, recipe_name, device)
    with draft(KIND, entry.name, config) as work:
        return _tune(entry, recipe, folder, device.choice, work, watcher)


def _rehearse(entry: Model, recipe: Recipe, recipe_name: str, watcher: Watcher) -> Run:
    steps = min(recipe.schedule.steps, REHEARSAL_STEPS)
    short = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"steps": steps, "max_tokens": 4096})})
    device = hardware.choose_device()
    texts = [path.read_text(encoding="utf-8") for path in sorted(data.KNOWLEDGE.glob("*.md"))]
    with (
        draft(KIND, entry.name, _config(entry, short, recipe_name, device), rehearsal=True) as work,
        tempfile.TemporaryDirectory() as folder,
    ):
        rehearsal.build(entry, texts, Path(folder))
        return _tune(entry, short, Path(folder), device.choice, work, watcher)


def _tune(entry: Model, recipe: Recipe, folder: Path, device: str, work: Draft, watcher: Watcher) -> Run:
    import torch
    from transformers import AutoTokenizer

    hardware.use_all_cores()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    locked = template.lock(tokenizer)
    work.write_json(template.LOCK_FILE, locked)
    watcher.say("making the instruction set")
    groups = training_set(recipe, tokenizer)
    examples = sum(len(set(g.branch)) - 1 for g in groups)
    watcher.say(f"{len(groups)} groups of passages, {examples} questions, {sum(g.supervised for g in groups)} supervised tokens")
    torch.manual_seed(recipe.schedule.seed)  # decides the adapter's first weights
    model = adapter.attach(
        load_base(folder, recipe, device), recipe.lora, entry.target_modules, quantised=recipe.method == "qlora"
    )
    training = Training(model, groups, recipe, tokenizer.pad_token_id, work.scratch)
    if training.first_step:
        watcher.say(f"resuming after step {training.first_step} of {recipe.schedule.steps}")
    _keep_rows(work.path / METRICS, training.first_step)

    def on_step(step: Step) -> None:
        work.append_jsonl(METRICS, as_row(step))
        watcher.step(step)

    training.run(on_step)
    change = adapter.prove_effect(model, locked["golden"][-1]["token_ids"])
    adapter.save(model, entry, work.path / adapter.ADAPTER_FOLDER)
    adapter.to_gguf(work.path / adapter.ADAPTER_FOLDER, model.config, work.path / adapter.GGUF_FILE)
    rows = [json.loads(line) for line in (work.path / METRICS).read_text(encoding="utf-8").splitlines()]
    draw_loss(rows, f"{entry.name}, {recipe.method}" + (" (rehearsal)" if work.rehearsal else ""), work.path / "loss.png")
    return work.finish(_facts(rows, change, examples) | {"data_sha256": _fingerprint(groups)})


def training_set(recipe: Recipe, tokenizer: Any) -> list[Packed]:
    """Return the packed groups of a recipe: as many as its steps take."""
    config = data.load_reader(recipe.data)
    corpus, _ = data.corpora(config)
    s = recipe.schedule
    made = training_groups(config, corpus, s.steps * s.groups_per_step, s.questions_per_group, s.seed)
    return [pack(group, tokenizer, s.max_tokens) for group in made]


def load_base(folder: Path, recipe: Recipe, device: str) -> Any:
    """Load a causal language model: bfloat16 on "cuda", float32 on "cpu"; NF4 projections for qlora."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    settings: dict[str, Any] = {"dtype": kind, "attn_implementation": "sdpa", "use_safetensors": True}
    if recipe.method == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
    with weights.quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **settings)


def draw_loss(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the loss of each step and its running mean as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    window = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="0.75", label="step")
    axes.plot(steps, smooth, color="tab:blue", label="running mean")
    axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def _config(entry: Model, recipe: Recipe, recipe_name: str, device: hardware.Choice) -> dict[str, Any]:
    return {"model": entry.model_dump(exclude={"facts"}), "data": data.resolved(data.load_reader(recipe.data)),
            "recipe_name": recipe_name, "recipe": recipe.model_dump(), "device": device._asdict()}  # fmt: skip


def _fingerprint(groups: Sequence[Packed]) -> str:
    """Return the sha256 of the token ids that were trained on, in order."""
    return hashlib.sha256(json.dumps([group.tokens for group in groups]).encode()).hexdigest()


def _keep_rows(path: Path, steps: int) -> None:
    """Drop the rows after the checkpoint, which will be measured again."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(rows[:steps]))


def _facts(rows: Sequence[dict[str, Any]], change: float, examples: int) -> dict[str, Any]:
    seconds = sum(r["tokens"] / r["tokens_per_second"] for r in rows)
    return {
        "steps": len(rows), "questions": examples, "final_loss": sum(r["loss"] for r in rows[-5:]) / len(rows[-5:]),
        "seconds": round(seconds, 1), "tokens_per_second": round(sum(r["tokens"] for r in rows) / seconds, 1),
        "questions_per_second": round(examples / seconds, 2), "peak_memory_bytes": max(r["peak_memory_bytes"] for r in rows),
        "logit_change": change,
    }  # fmt: skip
