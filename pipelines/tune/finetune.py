"""The tuning job: data -> plan -> weights -> train -> prove -> save -> run. `make finetune MODEL=... RECIPE=...`

Decides once whether the model is tuned or only rehearsed, and says why. It prints nothing itself: a `Watcher` is told
what happens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pipelines import catalogue, hardware, runs, weights
from pipelines.architecture import config_of, loader, takes_positions
from pipelines.catalogue import Model
from pipelines.errors import ConfigError, PlanDoesNotFit, RehearsalRefused, Rehearsed, Unsupported, WeightsMissing
from pipelines.plan import Plan, against, make_plan
from pipelines.runs import Draft, Run, draft
from pipelines.tune import adapter, proof, rehearsal, source, template
from pipelines.tune.parallel import Team, team
from pipelines.tune.preference import REFERENCE_FILE, Preferences, check_first_loss
from pipelines.tune.recipe import Lora, Recipe, load_recipe
from pipelines.tune.record import METRICS, draw_loss, facts_of, keep_rows
from pipelines.tune.sft import Supervised
from pipelines.tune.training import ALONE, Objective, Step, Training, as_row
from pipelines.tune.turns import load_tokenizer

KIND = "finetune"
PLAN_FILE = "plan.json"
MODEL_FOLDER = "model"
BEFORE_FILE = "before.safetensors"
REHEARSAL_STEPS = 6
LATEST = "latest"


class Watcher(Protocol):
    """Who follows the job."""

    def say(self, text: str) -> None:
        """Take one line for the user."""

    def plan(self, plan: Plan) -> None:
        """Take the plan, before anything is loaded."""

    def begin(self, model: str, recipe: str, *, rehearsal: bool) -> None:
        """Take what is trained, before a training; a rehearsed dpo has two."""

    def step(self, step: Step) -> None:
        """Take the figures of an optimiser step."""

    def proof(self, card: dict[str, Any]) -> None:
        """Take the proof card."""

    def outcome(self, planned: dict[str, Any]) -> None:
        """Take what was planned beside what was measured, at the end."""


@dataclass(frozen=True)
class Job:
    """What the user asked for.

    Attributes:
        model: a catalogue entry.
        recipe: a name in configs/recipes; None means the model's own.
        overrides: fields of the recipe, `a.b=c`.
        rehearse: rehearse on a shrunk model with random weights.
        pull: weights may be fetched.
        start: for dpo, the run whose adapter is tuned further: its id, or "latest".
        resume: go on from a checkpoint of the same job; False begins anew.
        processes: how many share the work of a step.
    """

    model: str
    recipe: str | None = None
    overrides: Sequence[str] = ()
    rehearse: bool = False
    pull: bool = True
    start: str = LATEST
    resume: bool = True
    processes: int = 1


@dataclass(frozen=True)
class _Work:
    """A job whose questions are answered: which model, how, from what, and where."""

    entry: Model
    recipe: Recipe
    recipe_name: str
    start: Run | None
    device: hardware.Choice
    resume: bool
    team: Team = ALONE
    prepared: source.Prepared | None = None
    short_of_memory: bool = False

    @property
    def checkpointing(self) -> bool:
        """Return True if activations are computed twice, which gives the same numbers, bit for bit."""
        return self.recipe.schedule.checkpointing or self.short_of_memory

    @property
    def lora(self) -> Lora | None:
        """Return the shape of the adapter; for dpo that of the run it starts from."""
        return Lora.model_validate(self.start.json("config.json")["recipe"]["lora"]) if self.start else self.recipe.lora

    @property
    def quantised(self) -> bool:
        """Return True if the base is in 4 bits; for dpo as it was in the run it starts from."""
        return bool(self.start.json("config.json")["quantised"]) if self.start else self.recipe.quantised

    @property
    def config(self) -> dict[str, Any]:
        """Return what decides the result, for the run."""
        start = {"run": self.start.id, "fingerprint": self.start.fingerprint} if self.start else None
        return {"model": self.entry.model_dump(exclude={"facts"}), "data": source.resolved(self.recipe),
                "recipe_name": self.recipe_name, "recipe": self.recipe.model_dump(), "device": self.device._asdict(),
                "quantised": self.quantised, "start": start}  # fmt: skip


def finetune(job: Job, watcher: Watcher) -> Run:
    """Tune a model and return the finished run; with `job.rehearse`, rehearse it.

    Raises:
        UnknownName, ConfigError: the model or recipe does not exist or does not fit its schema.
        Rehearsed: the weights are not to be had or the plan does not fit; the rehearsal was done instead, and says so.
        TrainingFailed: the result must not be used.
    """
    asked = _asked(job)
    entry, device = asked.entry, asked.device
    _check_processes(job, asked.recipe, device.choice)
    watcher.say(f"device: {device.choice} ({device.reason}); recipe: {asked.recipe_name}")
    if not job.rehearse:
        asked = _with_data(asked, job)
    asked, plan = _fitting(asked, job)
    watcher.plan(plan)
    if asked.short_of_memory and not job.rehearse:
        watcher.say("memory is short: activations will be computed twice (schedule.checkpointing), which takes longer")
    if job.rehearse:
        return _rehearse(asked, watcher)
    try:
        plan.check()
        folder = weights.obtain(entry, pull=job.pull, say=watcher.say)
    except (PlanDoesNotFit, WeightsMissing) as problem:
        watcher.say(f"{problem}\nrehearsing instead: {entry.name}'s architecture, shrunk, with random weights")
        run = _rehearse(asked, watcher)
        raise Rehearsed(f"{entry.name} was rehearsed, not tuned (run {run.id}): {problem.came}", problem.expected,
                        f"{problem.next_command}; or make finetune MODEL=smollm2-135m") from None  # fmt: skip
    if asked.prepared is None:  # the weights were fetched just now
        asked, plan = _fitting(_with_data(asked, job), job)
        plan.check()
    with draft(KIND, entry.name, asked.config) as work, team(job, job.processes) as together:
        return _tune(replace(asked, team=together), folder, work, watcher, plan)


def plan_of(job: Job) -> Plan:
    """Return what a job will need: for its real data where the weights are here, else for the most that its recipe allows."""
    return _fitting(_with_data(_asked(job), job), job)[1]


def assist(job: Job, together: Team) -> None:
    """Compute a helper's share of a job whose leader is another process; `TrainingFailed` when the leader is gone."""
    asked = replace(_asked(job), team=together)
    together.meet()  # the leader has made what is made once: converted weights, embeddings
    loaded = _load(asked, weights.obtain(asked.entry, pull=False, say=lambda _: None))
    objective = Supervised(loaded.tokenizer.pad_token_id)
    probe = proof.Probe(loaded.tokenizer, loaded.prepared.held_out)
    measured = together.agree(0)
    if together.sharded and not measured:
        probe.measure(loaded.model)
    with tempfile.TemporaryDirectory() as nothing:  # checkpoints are the leader's
        Training(loaded.model, loaded.prepared.steps, asked.recipe, objective, Path(nothing), together).assist()
    if together.sharded:
        probe.measure(loaded.model)
        probe.stop_rate(loaded.model)


def _asked(job: Job) -> _Work:
    entry = catalogue.runnable(job.model)
    recipe_name = job.recipe or entry.default_recipe
    recipe = load_recipe(recipe_name, job.overrides)
    source.check(recipe)
    return _Work(entry, recipe, recipe_name, None, hardware.choose_device(), job.resume)


def _check_processes(job: Job, recipe: Recipe, device: str) -> None:
    if job.processes == 1:
        return
    if job.rehearse or recipe.method == "dpo":
        what = "a rehearsal" if job.rehearse else recipe.method
        raise ConfigError(f"{job.processes} processes were asked for, for {what}", "a supervised method on real weights",
                          "the same command without --processes")  # fmt: skip
    gpus = hardware.cuda_devices() if device == "cuda" else job.processes
    if gpus < job.processes:
        raise ConfigError(f"{job.processes} processes were asked for", f"at most one for each GPU that torch can use, {gpus}",
                          f"--processes {gpus}")  # fmt: skip


def _with_data(asked: _Work, job: Job) -> _Work:
    """Return the job with what it starts from and learns from; without weights, and so without tokenizer, as it was."""
    if not weights.is_here(asked.entry):
        return asked
    asked = replace(asked, start=_start(asked.entry, asked.recipe, job.start))
    return replace(asked, prepared=_prepared(asked, weights.hf_directory(asked.entry)))


def _prepared(asked: _Work, folder: Path) -> source.Prepared:
    shared = takes_positions(config_of(asked.entry))
    return source.prepare(asked.recipe, load_tokenizer(folder, asked.entry), asked.device.choice, shared=shared)


def _fitting(asked: _Work, job: Job) -> tuple[_Work, Plan]:
    """Return the job with its plan; with checkpointing if it fits only so."""
    plan = _plan(asked, job)
    lighter = replace(asked, short_of_memory=True)
    if plan.fits_memory or asked.checkpointing or not (planned := _plan(lighter, job)).fits_memory:
        return asked, plan
    return lighter, planned


def _plan(asked: _Work, job: Job) -> Plan:
    machine = hardware.probe(weights.model_cache())
    schedule = asked.recipe.schedule.model_copy(update={"checkpointing": asked.checkpointing})
    recipe = asked.recipe.model_copy(update={"schedule": schedule})
    return make_plan(asked.entry, recipe, machine, asked.device.choice, on_disk=weights.is_here(asked.entry),
                     lora=asked.lora, quantised=asked.quantised, processes=job.processes,
                     steps=asked.prepared.steps if asked.prepared else None)  # fmt: skip


def _start(entry: Model, recipe: Recipe, wanted: str) -> Run | None:
    """Return the supervised run that preferences are learnt on top of; None for any other method."""
    if recipe.method != "dpo":
        return None
    if wanted != LATEST:
        run = runs.find(wanted)
        if run.rehearsal:
            raise RehearsalRefused(f"run {run.id} is a rehearsal", "a run on real weights", "llmlab runs")
    else:
        found = [r for p in runs.all_runs(KIND, entry.name) if not (r := runs.read(p)).rehearsal and _is_supervised(r)]
        if not found:
            raise ConfigError(f"{entry.name} has no supervised run to learn preferences on top of", "the adapter of a run",
                              f"make finetune MODEL={entry.name}, then the same command again")  # fmt: skip
        run = found[-1]
    if (run.kind, run.model) != (KIND, entry.name) or not _is_supervised(run):
        raise ConfigError(f"run {run.id} is {run.kind} of {run.model} and has no adapter of a supervised training",
                          f"a lora or qlora run of {entry.name}", "llmlab runs")  # fmt: skip
    return run


def _is_supervised(run: Run) -> bool:
    return run.json("config.json")["recipe"]["method"] in ("lora", "qlora")


def _rehearse(asked: _Work, watcher: Watcher) -> Run:
    """Take the shrunk architecture through the same code; for dpo, through a short supervised training first."""
    with tempfile.TemporaryDirectory() as folder:
        rehearsal.build(asked.entry, rehearsal.texts(), Path(folder))
        if asked.recipe.method == "dpo":
            first = load_recipe("lora", ["lora.rank=8"])
            start = _rehearsed(replace(asked, recipe=first, recipe_name="lora"), Path(folder), watcher)
            asked = replace(asked, start=start)
        return _rehearsed(asked, Path(folder), watcher)


def _rehearsed(asked: _Work, folder: Path, watcher: Watcher) -> Run:
    schedule = asked.recipe.schedule
    steps = min(schedule.steps or REHEARSAL_STEPS, REHEARSAL_STEPS)
    short = schedule.model_copy(update={"steps": steps, "epochs": None, "max_tokens": 4096})  # its tokenizer knows fewer words
    asked = replace(asked, recipe=asked.recipe.model_copy(update={"schedule": short}), prepared=None, short_of_memory=False)
    with draft(KIND, asked.entry.name, asked.config, rehearsal=True) as work:
        return _tune(asked, folder, work, watcher)


def _tune(asked: _Work, folder: Path, work: Draft, watcher: Watcher, plan: Plan | None = None) -> Run:
    if not asked.resume:
        work.forget()
    recipe = asked.recipe
    watcher.begin(asked.entry.name, asked.recipe_name, rehearsal=work.rehearsal)
    watcher.say("preparing data and model")
    loaded = _load(asked, folder)
    asked.team.meet()
    tokenizer, prepared, model = loaded.tokenizer, loaded.prepared, loaded.model
    work.write_json(template.LOCK_FILE, template.lock(tokenizer))
    for note in prepared.notes:
        watcher.say(note)
    watcher.say(f"{prepared.rows} rows in {len(prepared.steps)} steps, {prepared.supervised} supervised tokens")
    probe = proof.Probe(tokenizer, prepared.held_out)
    asked.team.agree((work.scratch / BEFORE_FILE).is_file())  # of a sharded model, helpers measure with the leader
    before = probe.before(model, work.scratch / BEFORE_FILE)
    objective = _objective(asked, model, prepared, tokenizer, work)
    training = Training(model, prepared.steps, recipe, objective, work.scratch, asked.team, watcher.say)
    if training.first_step:
        watcher.say(f"resuming after step {training.first_step} of {len(prepared.steps)}")
    keep_rows(work.path / METRICS, training.first_step)

    def on_step(step: Step) -> None:
        if step.step == 1 and recipe.method == "dpo":
            check_first_loss(step.loss)
        work.append_jsonl(METRICS, as_row(step))
        watcher.step(step)

    training.run(on_step)
    watcher.say("proving the result")
    card = proof.card(
        before, probe.measure(model), probe.stop_rate(model), adapter.servable(recipe.method, asked.lora, asked.entry)
    )
    work.write_json(proof.CARD_FILE, card)
    watcher.proof(card)
    _save(asked, model, tokenizer, work)
    rows = [json.loads(line) for line in (work.path / METRICS).read_text(encoding="utf-8").splitlines()]
    draw_loss(rows, f"{asked.entry.name}, {recipe.method}" + (" (rehearsal)" if work.rehearsal else ""), work.path / "loss.png")
    facts = facts_of(rows) | {"logit_change": card["logit_change"], "data_sha256": prepared.sha256}
    if plan:
        planned = against(plan, facts["peak_memory_bytes"], facts["seconds"])
        work.write_json(PLAN_FILE, planned)
        watcher.outcome(planned)
    return work.finish(facts, inputs=(asked.start,) if asked.start else ())


@dataclass(frozen=True)
class _Loaded:
    """What every process of a training holds."""

    tokenizer: Any
    prepared: source.Prepared
    model: Any


def _load(asked: _Work, folder: Path) -> _Loaded:
    import torch

    hardware.use_all_cores(asked.team.size)
    tokenizer = load_tokenizer(folder, asked.entry)
    prepared = asked.prepared or _prepared(asked, folder)
    torch.manual_seed(asked.recipe.schedule.seed)  # decides the adapter's first weights
    return _Loaded(tokenizer, prepared, _model(asked, folder))


def _model(asked: _Work, folder: Path) -> Any:
    """Return the model with what is to be trained requiring gradients; of a sharded one, this process's share."""
    recipe, checkpointing = asked.recipe, asked.checkpointing
    shard = recipe.schedule.shard_weights and asked.team.size > 1
    base = load_base(folder, asked.device.choice, quantised=asked.quantised, in_main_memory=shard)
    if asked.start:
        return adapter.resume(
            base, asked.start.path / adapter.ADAPTER_FOLDER, quantised=asked.quantised, checkpointing=checkpointing
        )
    if recipe.lora is None:
        return adapter.ready(base, quantised=False, checkpointing=checkpointing)
    where = asked.entry.tuning
    assert where  # runnable
    model = adapter.attach(base, recipe.lora, where.target_modules, quantised=asked.quantised, dora=recipe.method == "dora",
                           checkpointing=checkpointing, experts=where.expert_parameters, frozen=where.frozen)  # fmt: skip
    if shard:
        asked.team.shard(model)
    return model


def _objective(asked: _Work, model: Any, prepared: source.Prepared, tokenizer: Any, work: Draft) -> Objective:
    if asked.recipe.preference is None:
        return Supervised(tokenizer.pad_token_id)
    beta, kept = asked.recipe.preference.beta, work.path / REFERENCE_FILE
    return Preferences(model, prepared.steps, beta, tokenizer.pad_token_id, kept)


def _save(asked: _Work, model: Any, tokenizer: Any, work: Draft) -> None:
    """Write what was trained: the whole model, or the adapter as PEFT files and, where llama.cpp can apply it, as GGUF."""
    if asked.recipe.method == "full":
        model.save_pretrained(work.path / MODEL_FOLDER)
        tokenizer.save_pretrained(work.path / MODEL_FOLDER)
        return
    adapter.save(model, asked.entry, work.path / adapter.ADAPTER_FOLDER)
    if asked.recipe.method != "dora" and adapter.has_gguf(asked.entry):
        adapter.to_gguf(work.path / adapter.ADAPTER_FOLDER, model.config, work.path / adapter.GGUF_FILE)


def load_base(folder: Path, device: str, *, quantised: bool, in_main_memory: bool = False) -> Any:
    """Load a language model, with its eyes if it has any: bfloat16 on "cuda", float32 on "cpu"; NF4 projections if `quantised`.

    Args:
        folder: of the weights.
        device: "cuda" is the current one.
        quantised: make the projections NF4.
        in_main_memory: leave it there, in the form that suits the device.

    Raises:
        Unsupported: nothing of this architecture would be quantised.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    settings: dict[str, Any] = {"dtype": kind, "use_safetensors": True}
    if quantised:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
    with weights.quiet_loading():
        place = torch.cuda.current_device() if device == "cuda" and not in_main_memory else "cpu"
        model = loader(AutoConfig.from_pretrained(folder)).from_pretrained(folder, device_map={"": place}, **settings)
    if quantised and not any("Linear4bit" in type(module).__name__ for module in model.modules()):
        came = f"bitsandbytes finds no projection of {type(model).__name__} that it can make NF4"
        raise Unsupported(came, "plain Linear layers", "the same command with --recipe lora")
    for module in model.modules() if quantised else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it would repack the weights for good, in a form that only infers
            module.support_avx512bf16_for_cpu = False
    return model
