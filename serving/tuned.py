"""Which tuned model is served, and whether it may be: a finished, real run of this model, in the engine's chat template.

The default is the adapter of the newest finetune run; "none" serves the base alone; a run's id takes that run, even a
rehearsal. An export run is a model of its own and is served in place of the base.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import runs
from pipelines.catalogue import Model
from pipelines.errors import FingerprintMismatch, RehearsalRefused, RunIncomplete
from pipelines.runs import Run
from serving.engines.contract import Adapter, Engine, Launch

LATEST, NONE = "latest", "none"
KIND, EXPORT = "finetune", "export"
PROOF_FILE = "proof.json"


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
    run = _latest(model.name) if wanted == LATEST else runs.find(wanted)
    if run:
        _check_kinship(model, run)
    return run


def adapter_of(run: Run, model: str) -> Adapter:
    """Return the adapter of a run under its public name; `RunIncomplete` if it has none that engines apply."""
    card = run.json(PROOF_FILE) if (run.path / PROOF_FILE).is_file() else {"servable": {}}
    refusals = [answer for answer in card["servable"].values() if answer != "yes"]
    if refusals:
        came = f"run {run.id} cannot be served beside its base: {refusals[0].removeprefix('no: ')}"
        way_on = f"llmlab export {model} --run {run.id}, then llmlab serve {model} --adapter with the id of that run"
        raise RunIncomplete(came, "a run of the recipe lora, qlora or dpo", way_on)
    adapter = Adapter(tuned_name(model), run.path / "adapter", run.path / "adapter.gguf")
    for path in (adapter.peft / "adapter_config.json", adapter.peft / "adapter_model.safetensors", adapter.gguf):
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
    if trained_on and model.weights and trained_on != model.weights.revision:
        came = f"run {run.id} was trained on revision {trained_on[:8]} of {model.name}"
        raise FingerprintMismatch(came, f"revision {model.weights.revision[:8]}, which the catalogue pins", "make finetune")
