"""Which tuned models are served, and whether they may be: finished, real runs of this model, in the engine's chat template.

The default is the adapter of the newest finetune run; "none" serves the base alone; a run's id takes that run, even a
rehearsal; several runs are served beside each other. An export run is a model of its own and is served in place of the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import runs
from pipelines.catalogue import Model
from pipelines.errors import ConfigError, FingerprintMismatch, RehearsalRefused, RunIncomplete, UnknownName
from pipelines.runs import Run
from serving.engines.contract import Adapter, Engine, Launch

LATEST, NONE = "latest", "none"
KIND, EXPORT = "finetune", "export"
PROOF_FILE = "proof.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"  # of an adapter: it stands in URLs, logs and an engine's command line
RUN_ID = r"[0-9A-Za-z][0-9A-Za-z-]{0,39}"


@dataclass(frozen=True)
class Chosen:
    """What is served beside the base or in its place.

    Attributes:
        whole: an export run, served in place of the base; or None.
        adapters: served beside the base, the one with the model's tuned name first.
    """

    whole: Run | None
    adapters: tuple[Adapter, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Return every run that something is served of."""
        return (*((self.whole,) if self.whole else ()), *(adapter.run for adapter in self.adapters))


def choose(model: Model, wanted: Sequence[str]) -> Chosen:
    """Return the runs that are served, verified, under their public names.

    Args:
        model: the model that is served.
        wanted: each "latest", "none", the id of a run, or NAME=RUN; of those without a name the newest run is called
            MODEL-tuned, the others MODEL- with the end of their id.

    Raises:
        ConfigError: a name is not allowed or is given twice, or an export run is not alone.
        LabError: as for `choose_run` and `adapter_of`.
    """
    named = [(name, choose_run(model, run)) for name, run in map(_parts, wanted)]
    found = [(name, run) for name, run in named if run]
    if any(run.kind == EXPORT for _, run in found):
        if len(named) > 1 or found[0][0]:
            raise ConfigError("an export run is served in place of the base", "that run alone, without a name",
                              f"--adapter {found[0][1].id}")  # fmt: skip
        return Chosen(found[0][1], ())
    newest = max((run.id for name, run in found if not name), default="")
    adapters = [adapter_of(run, model.name, name or _name(model.name, run, newest)) for name, run in found]
    check_names(model.name, [adapter.name for adapter in adapters])
    return Chosen(None, tuple(sorted(adapters, key=lambda adapter: adapter.name != tuned_name(model.name))))


def check_names(model: str, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless the names of adapters are fit to be one, and none is the base's or given twice."""
    for name in names:
        if not re.fullmatch(NAME, name):
            expected = "letters, digits, dots, dashes and underscores, at most 80"
            raise ConfigError(f"{name[:80]!r} cannot be the name of an adapter", expected, "--adapter NAME=RUN")
        if name == model or names.count(name) > 1:
            raise ConfigError(f"{name!r} would name two models", "a name of its own for each", "--adapter NAME=RUN")


def short_name(model: str, run: Run) -> str:
    """Return the name of an adapter that is not the newest: the model's with the end of the run's id."""
    return f"{model}-{run.id.rpartition('-')[2]}"


def choose_run(model: Model, wanted: str) -> Run | None:
    """Return the run whose adapter or model is served, verified, or None for the base alone.

    Args:
        model: the model that is served.
        wanted: "latest", "none", or the id of a run.

    Raises:
        UnknownName: no run has that id.
        RunIncomplete: the run is not intact, or holds no adapter.
        RehearsalRefused: there are only rehearsals, and none was named.
        FingerprintMismatch: the run is of another model or of another revision of it.
    """
    if wanted == NONE:
        return None
    if not re.fullmatch(RUN_ID, wanted):
        raise UnknownName(f"no run is named {wanted[:80]!r}", "the id of one run", "llmlab runs list")
    run = _latest(model.name) if wanted == LATEST else runs.find(wanted)
    if run:
        _check_kinship(model, run)
    return run


def adapter_of(run: Run, model: str, name: str = "") -> Adapter:
    """Return the adapter of a run, called `name` or MODEL-tuned; `RunIncomplete` if it has none that engines apply."""
    card = run.json(PROOF_FILE) if (run.path / PROOF_FILE).is_file() else {"servable": {}}
    refusals = [answer for answer in card["servable"].values() if answer != "yes"]
    if refusals and len(refusals) == len(card["servable"]):
        came = f"run {run.id} cannot be served beside its base: {refusals[0].removeprefix('no: ')}"
        way_on = f"llmlab export {model} --run {run.id}, then llmlab serve {model} --adapter with the id of that run"
        raise RunIncomplete(came, "a run of the recipe lora, qlora or dpo", way_on)
    adapter = Adapter(name or tuned_name(model), run)
    gguf = [adapter.gguf] if card["servable"].get("llamacpp", "yes") == "yes" else []
    for path in (adapter.peft / "adapter_config.json", adapter.peft / "adapter_model.safetensors", *gguf):
        if not path.is_file():
            raise RunIncomplete(
                f"run {run.id} has no {path.relative_to(run.path)}", "an adapter as PEFT files and as GGUF", "make finetune"
            )
    return adapter


def tuned_name(model: str) -> str:
    """Return what a request's `model` says to get the tuned form of a model."""
    return f"{model}-tuned"


def exported_base(run: Run, engine: str) -> Path:
    """Return the weights of an export run in the form that an engine reads.

    Raises:
        RunIncomplete: it was exported without a GGUF file, and llama.cpp reads nothing else.
    """
    if engine != "llamacpp":
        return run.path / "model"
    found = sorted(run.path.glob("*.gguf"))
    if not found:
        raise RunIncomplete(f"run {run.id} has no GGUF file", "one, for llama.cpp", f"llmlab export {run.model}")
    return found[0]


def check_template(run: Run, engine: Engine, launch: Launch) -> None:
    """Compare the chat template of the running engine with the one that the adapter was trained with.

    Raises:
        FingerprintMismatch: the engine renders a golden chat to other tokens.
    """
    import httpx

    from pipelines.tune import template

    with httpx.Client(trust_env=False, timeout=30.0) as client:
        template.check(run.json(template.LOCK_FILE), lambda chat: engine.render(client, launch, chat), engine.name)


def _parts(wanted: str) -> tuple[str, str]:
    """Return (name or nothing, run) of NAME=RUN or RUN."""
    name, equals, run = wanted.rpartition("=")
    if equals and not name:
        raise ConfigError(f"{wanted[:80]!r} has no name", "NAME=RUN, or RUN alone", "llmlab runs list")
    return name, run


def _name(model: str, run: Run, newest: str) -> str:
    return tuned_name(model) if run.id == newest else short_name(model, run)


def _latest(model: str) -> Run | None:
    run = runs.latest(KIND, model)
    if run is None and (rehearsal := runs.latest(KIND, model, rehearsal=True)):
        came = f"the only run of {model}, {rehearsal.id}, is a rehearsal: its base was shrunk and random"
        way_on = f"make finetune MODEL={model}, or serve the base alone with --adapter none"
        raise RehearsalRefused(came, "a run on real weights", way_on)
    return run


def _check_kinship(model: Model, run: Run) -> None:
    if run.kind not in (KIND, EXPORT) or run.model != model.name:
        raise FingerprintMismatch(
            f"run {run.id} is {run.kind} of {run.model}",
            f"{KIND} or {EXPORT} of {model.name}",
            f"llmlab runs, or llmlab serve {run.model} --adapter {run.id}",
        )
    trained_on = run.json("adapter/adapter_config.json").get("revision") if (run.path / "adapter").is_dir() else None
    pinned = model.weights.revision if model.weights else None
    if trained_on and pinned and trained_on != pinned:
        came = f"run {run.id} was trained on revision {trained_on[:8]} of {model.name}"
        raise FingerprintMismatch(came, f"revision {pinned[:8]}, which the catalogue pins", "make finetune")
