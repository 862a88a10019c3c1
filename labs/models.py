"""The catalogue on the screen: `llmlab models`, `show`, `choose` and `plan`. It measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from labs import figures
from labs.figures import Row
from pipelines.catalogue import FACT_KEYS, Model, all_models, find
from pipelines.config import ROOT
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.sizing import Fit

KEYS = FACT_KEYS[:4]
SORTS: dict[str, Callable[[Model], float | None]] = {
    "name": lambda _: 0,  # the catalogue is in this order
    "cost": figures.cost_of,
    "context": lambda m: -(figures.context_of(m) or 0) or None,
    "memory": figures.four_bit_bytes,
    "accuracy": lambda m: _down(figures.number_of(m, "accuracy")),
    "latency": lambda m: figures.number_of(m, "latency"),
    "throughput": lambda m: _down(figures.number_of(m, "throughput")),
}
MEASURED = ROOT / "labs" / "measured" / "lora.json"
PLOT = ROOT / ".cache" / "pareto.png"
CONTEXT_OF_PLAN = 8192

ModelName = Annotated[str, typer.Argument(help="A name from `llmlab models`.")]


def models(
    only_open: Annotated[bool, typer.Option("--open", help="Only those whose weights can be had.")] = False,
    license_: Annotated[str | None, typer.Option("--license", help="Words of the licence or of its gate: apache, none.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Weights in 4 bits take at most so much: 24GB.")] = None,
    context: Annotated[str | None, typer.Option(help="Takes at least so long a text: 32k.")] = None,
    sort: Annotated[
        Literal["name", "cost", "context", "memory", "accuracy", "latency", "throughput"],
        typer.Option(help="What is best comes first, what is not known last."),
    ] = "name",
) -> None:
    """List the catalogue. Example: llmlab models --open --license apache --max-memory 24GB --context 32k --sort memory."""
    from labs.screen import say, table

    wanted = [m for m in all_models() if _wanted(m, only_open, license_, max_memory, context)]
    wanted.sort(key=lambda m: ((value := SORTS[sort](m)) is None, value if value is not None else 0))
    rows = [[m.name, *(_said(m, k) for k in KEYS), _gigabytes(m), _dollars(figures.cost_of(m)), _where(m)] for m in wanted]
    table("Models (the document's statement; the maker's after the slash)",
          ["name", *KEYS, "GB in 4 bits", "$ per M tokens", "runs on"], rows, names_whole=True)  # fmt: skip
    say(f"{len(rows)} of {len(all_models())}; $ is for three tokens read and one written, where it has a price")


def show(name: ModelName) -> None:
    """Show what the catalogue knows about a model: the document's statements beside the maker's, and how it is run."""
    from labs.screen import table

    model = find(name)
    said = [(k, f.document or "", f.maker or "") for k, f in model.facts.items()]
    table(model.title, ["fact", "the document", "the maker"], said)
    run: list[tuple[str, Any]] = [("reads", ", ".join(model.modality))]
    run += [("sibling of", model.like)] if model.like else []
    run += [("provider", model.provider)] if model.provider else []
    if model.weights and model.config and model.tuning and model.serving:
        w = model.weights
        run += [("weights", w.hub), ("revision", w.revision or "not pinned: llmlab pull takes the newest, and keeps its commit"),
                ("licence gate", w.license_gate), ("to fetch", f"{w.size_bytes / 1e9:.1f} GB"),
                ("architecture", model.config["model_type"]), ("longest text", f"{model.context_tokens} tokens"),
                ("recipe", model.tuning.recipe), ("adapter on", ", ".join(model.tuning.target_modules)),
                ("and on", ", ".join(model.tuning.expert_parameters) or "nothing else"),
                ("frozen", ", ".join(model.tuning.frozen) or "the rest of the base"),
                ("engines", ", ".join(model.serving.engines) or "none"),
                ("quantisation", model.serving.quantisation)]  # fmt: skip
    table("How it is run", ["what", ""], run)
    if model.chat_template:
        table("Chat template", ["Jinja"], [[model.chat_template]])


def choose(
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Dollars for a million tokens, three read for one written.")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_latency: Annotated[float | None, typer.Option(min=0, help="The document's index.")] = None,
    plot: Annotated[Path, typer.Option(help="Where the picture of the Pareto front goes.")] = PLOT,
) -> None:
    """Rank the models of the document's table of performance and draw its Pareto front; the last line is JSON.

    Example: llmlab choose --max-cost 1 --min-accuracy 0.4
    """
    from labs.screen import json_line, say, table

    every = figures.table_of(all_models())
    best = figures.front(every)
    fitting = [row for row in every if _within(row, max_cost, min_accuracy, max_latency)]
    ranked = sorted(fitting, key=lambda row: (-row.accuracy, row.cost, row.latency))
    table("The document's table of 2025, the most accurate first",
          ["model", "$ per M tokens", "accuracy", "latency index", "tokens/s", "on the front"],
          [[r.name, _dollars(r.cost), f"{r.accuracy:.2f}", f"{r.latency:.2f}", f"{r.throughput:.0f}", "yes" if r in best else ""]
           for r in ranked])  # fmt: skip
    ours = _measured()
    if ours:
        table("Measured here (another task, so not one ranking)", ["what", "value"], list(ours.items()))
    _draw(every, best, ranked, plot)
    say(f"{len(ranked)} of {len(every)} models with figures fit; the picture is in {plot}")
    json_line({"ranked": [row.name for row in ranked], "front": [row.name for row in best], "measured": ours, "plot": str(plot)})


def plan(
    name: ModelName,
    recipe: Annotated[str | None, typer.Argument(help="A name from configs/recipes; the model's own if not given.")] = None,
    context: Annotated[str | None, typer.Option(help="Length of each text that is served: 32k; 8192 if not given.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field of the recipe: schedule.steps=50")] = None,
) -> None:
    """Show what serving and tuning a model needs: on GPUs, and tuning on this machine; no weights are loaded.

    It ends with status 3 where tuning does not fit this machine. Example: llmlab plan mistral-7b qlora --context 32k
    """
    from labs.screen import say, table
    from pipelines.tune.finetune import Job, plan_of

    made = plan_of(Job(name, recipe, set_ or ()))
    _show_sizes(find(name), recipe, set_ or (), context)
    table(f"Plan for this machine: {name}, {made.method}", ["what", "need"], made.rows())
    made.check()
    say("it fits")


def _show_sizes(model: Model, recipe: str | None, overrides: list[str] | tuple[str, ...], context: str | None) -> None:
    from labs.screen import say, table
    from pipelines import sizing
    from pipelines.architecture import cache_of, config_of
    from pipelines.tune.recipe import load_recipe

    made_for = model.context_tokens or CONTEXT_OF_PLAN
    length = figures.tokens(context) if context else min(CONTEXT_OF_PLAN, made_for)
    if length > made_for:
        raise ConfigError(
            f"--context {context}", f"at most {made_for} tokens, which {model.name} was made for", f"--context {made_for}"
        )
    found, batch = sizing.needs(model, load_recipe(recipe or model.default_recipe, overrides))
    cache = cache_of(config_of(model))
    table(f"{model.title} on GPUs: memory", ["bits", "weights to serve", f"cache of {length} tokens", "to tune an adapter"],
          [[n.bits, _gb(n.serve_bytes), _gb(cache.bytes(length)), _gb(n.tune_bytes)] for n in found])  # fmt: skip
    known = sizing.gpus()
    rows = []
    for gpu in known.gpus:
        served = [_cell(sizing.fit(known, gpu, n.serve_bytes, cache, length, made_for)) for n in found]
        tuned = [str(sizing.fewest(known, gpu, n.tune_bytes) or "-") for n in found if n.bits != 8]
        rows.append([f"{gpu.name}, {gpu.memory_gib:g} GiB", *served, *tuned])
    table(f"GPUs: how many x texts of {length} tokens at once (the longest text)",
          ["GPU", *(f"serve, {n.bits} bits" for n in found), "tune, 16 bits", "tune, 4 bits"], rows)  # fmt: skip
    say(f"'-': not on one machine with {max(known.counts)} of them. Tuning is of a step of {batch.sequences} x {batch.tokens} "
        "tokens; more than one GPU means lora-fsdp, and there is no recipe for 8 bits")  # fmt: skip


def _cell(found: Fit | None) -> str:
    return f"{found.gpus} x {found.at_once} ({found.longest})" if found else "-"


def _wanted(model: Model, only_open: bool, license_: str | None, max_memory: str | None, context: str | None) -> bool:
    size = figures.four_bit_bytes(model)
    if (only_open or max_memory) and size is None:
        return False
    if max_memory and size is not None and size > figures.size_bytes(max_memory):
        return False
    if context and (figures.context_of(model) or 0) < figures.tokens(context):
        return False
    gate = model.weights.license_gate if model.weights else ""
    words = license_.lower() if license_ else ""
    return words == gate or words in _said(model, "license").lower()


def _within(row: Row, max_cost: float | None, min_accuracy: float | None, max_latency: float | None) -> bool:
    return (
        (max_cost is None or row.cost <= max_cost)
        and (min_accuracy is None or row.accuracy >= min_accuracy)
        and (max_latency is None or row.latency <= max_latency)
    )


def _measured() -> dict[str, Any]:
    """Return what this project measured of SmolLM2-135M, for the screen; empty if the file is not there."""
    if not MEASURED.is_file():
        return {}
    kept = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {f"smollm2-135m, {what}": kept[key] for what, key in (
        ("token F1 with passages", "f1_base"), ("the same, tuned", "f1_tuned"),
        ("citation accuracy, tuned", "citation_accuracy"))}  # fmt: skip


def _draw(every: list[Row], best: list[Row], ranked: list[Row], path: Path) -> None:
    """Draw accuracy over cost; the front as a line, what does not fit the limits in grey."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    line = sorted(best, key=lambda row: row.cost)
    axes.plot([r.cost for r in line], [r.accuracy for r in line], color="tab:blue", linewidth=1, label="Pareto front")
    for row in every:
        axes.scatter(row.cost, row.accuracy, s=row.throughput / 2, color="tab:blue" if row in ranked else "0.7")
        axes.annotate(f"{row.name}\nlatency {row.latency:g}", (row.cost, row.accuracy), xytext=(8, -4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(title="The document's models (area: tokens per second)", xlabel="dollars for a million tokens, 3 read : 1 written",
             ylabel="accuracy", xscale="log")  # fmt: skip
    axes.margins(x=0.25, y=0.15)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


def _said(model: Model, key: str) -> str:
    fact = model.facts.get(key)
    return " / ".join(s for s in (fact.document, fact.maker) if s) if fact else ""


def _where(model: Model) -> str:
    if model.serving:
        return ", ".join(model.serving.engines) or "transformers only"
    return "provider" if model.provider else ""


def _gigabytes(model: Model) -> str:
    size = figures.four_bit_bytes(model)
    return f"{size / 1e9:.1f}" if size else ""


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _down(value: float | None) -> float | None:
    return None if value is None else -value
