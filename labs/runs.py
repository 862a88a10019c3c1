"""`llmlab runs`: the finished runs, and of each its facts, files, proof card and passport; which of them a command means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from pipelines.errors import LabError

if TYPE_CHECKING:
    from pipelines.runs import Run

runs_app = typer.Typer(invoke_without_command=True, help="Finished runs and their passports. Example: llmlab runs list")


@runs_app.callback()
def runs_(ctx: typer.Context) -> None:
    """List the finished runs, unless a sub-command says otherwise."""
    if ctx.invoked_subcommand is None:
        runs_list()


@runs_app.command("list")
def runs_list() -> None:
    """List the finished runs, oldest first."""
    from labs.screen import say, table
    from pipelines import runs

    rows = []
    for path in runs.all_runs():
        try:
            run = runs.read(path)
            rows.append([run.id, run.kind, run.model, "rehearsal" if run.rehearsal else "", _short_facts(run.facts)])
        except LabError as error:
            say(f"not listed: {error.came}")
    table(f"Runs in {runs.runs_root()}", ["id", "kind", "model", "", "facts"], rows)


@runs_app.command("show")
def runs_show(run_id: str) -> None:
    """Show one run: facts, files with their hashes, and the passport: every run it was made from."""
    from labs.screen import show_outcome, show_proof, table
    from pipelines import runs
    from pipelines.tune.finetune import PLAN_FILE
    from pipelines.tune.proof import CARD_FILE

    run = runs.find(run_id)
    table(
        f"{run.kind} {run.model} {run.id}" + (" (rehearsal)" if run.rehearsal else ""), ["fact", "value"], list(run.facts.items())
    )
    files = run.json(runs.MANIFEST)["files"]
    table(str(run.path), ["file", "bytes", "sha256"], [(n, f["bytes"], f["sha256"][:16]) for n, f in files.items()])
    if CARD_FILE in files:
        show_proof(run.json(CARD_FILE))
    if PLAN_FILE in files:
        show_outcome(run.json(PLAN_FILE))
    config = run.json("config.json")
    weights = config.get("model", {}).get("weights") or {}
    passport = [("this run", run.kind, run.id, run.fingerprint[:16])]
    passport += [("made from", i["kind"], i["id"], i["fingerprint"][:16]) for i in run.inputs]
    passport += (
        [("base", weights["hub"], (weights["revision"] or "not pinned")[:12], weights.get("package") or "")] if weights else []
    )
    table("Passport", ["", "kind", "id", "fingerprint"], passport)


def tuned_run(name: str, run_id: str | None) -> Run:
    """Return a finetune run of a model: the one that was named, or the newest.

    Raises:
        UnknownName: there is no such model or run.
        LabError: the run is of another kind or model, or there is none; says the command that makes one.
    """
    from pipelines import catalogue, runs
    from pipelines.tune.finetune import KIND

    catalogue.runnable(name)
    found = runs.find(run_id) if run_id else runs.latest(KIND, name)
    if found and (found.kind, found.model) != (KIND, name):
        raise LabError(f"run {found.id} is {found.kind} of {found.model}", f"{KIND} of {name}", "llmlab runs")
    if found is None:
        raise LabError(f"there is no finished finetune run of {name}", "a tuned model", f"make finetune MODEL={name}")
    return found


def _short_facts(facts: dict[str, Any]) -> str:
    wanted = ("final_loss", "rows", "seconds", "f1_base", "f1_tuned", "abstention_f1", "citation_accuracy", "test_questions")
    return ", ".join(f"{k} {facts[k]:.3g}" for k in wanted if k in facts)
