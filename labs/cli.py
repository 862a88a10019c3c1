"""The command line, `llmlab`: choose, plan, tune, evaluate, index, serve, ask, watch. The Makefile calls it.

Each command reads its configuration, calls one function of a package, and shows what came back. Errors that a person
can act on are printed without a traceback, and the exit status is theirs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from labs import models as catalogue_screen
from labs.bench.commands import bench_app
from labs.dashboards import dashboards_app
from labs.data import data_app
from labs.faults.commands import break_
from labs.frame.commands import lab_app, labs
from labs.index import index_app
from labs.keys import keys_app
from labs.runs import runs_app, tuned_run
from pipelines.errors import LabError
from pipelines.hardware import OPENMP_ENVIRONMENT

INTERRUPTED = 130


class LabGroup(TyperGroup):
    """Prints a `LabError` as its message and exits with its status; Ctrl-C ends with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LabError as error:
            _fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            _fail("interrupted; a checkpoint of a training is kept, and the same command goes on from it", INTERRUPTED)


app = typer.Typer(cls=LabGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="A hands-on lab that takes a language model through its whole life.\n\n"
                       "Example: llmlab finetune smollm2-135m && llmlab eval && llmlab index && llmlab serve")  # fmt: skip
app.add_typer(runs_app, name="runs")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(index_app, name="index")
app.add_typer(keys_app, name="keys")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(lab_app, name="lab")

ModelName = Annotated[str, typer.Argument(help="A name from `llmlab models`.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field of the configuration: schedule.steps=50")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the gateway; the configuration's if not given.")]


@app.command()
def doctor() -> None:
    """Check this machine and print the command that fixes each problem."""
    from labs.doctor import examine
    from labs.screen import say, table

    findings = examine()
    table("This machine", ["part", "", "found", "what to do"],
          [(f.what, f.mark, f.found, "" if f.ok else f.fix) for f in findings])  # fmt: skip
    if any(f.required and not f.ok for f in findings):
        raise typer.Exit(1)
    say("everything that the lab needs is here")


app.command()(catalogue_screen.models)
app.command()(catalogue_screen.show)
app.command()(catalogue_screen.choose)
app.command()(catalogue_screen.plan)
app.command()(labs)


@app.command()
def rehearse(names: Annotated[list[str] | None, typer.Argument(help="Open models; all if none is given.")] = None) -> None:
    """Take open models through their whole life, shrunk and with random weights, and write configs/models/README.md.

    About a minute for each model; it ends with status 1 if a step fails. Example: llmlab rehearse gemma-3 mixtral-8x7b
    """
    from labs.rehearse import COLUMNS, TITLES
    from labs.rehearse import rehearse as run
    from labs.screen import json_line, say, table
    from pipelines import catalogue

    models = [catalogue.runnable(name) for name in names or []] or [m for m in catalogue.all_models() if m.runnable]
    found = run(models, say)
    table("Rehearsals", ["model", *(TITLES[c] for c in COLUMNS)],
          [[name, *(cells[c].state for c in COLUMNS)] for name, cells in found.items()])  # fmt: skip
    json_line({name: {column: cell.state for column, cell in cells.items()} for name, cells in found.items()})
    if any(cell.state == "fails" for cells in found.values() for cell in cells.values()):
        raise typer.Exit(1)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A name from `llmlab models` or `llmlab index embedders`.")],
) -> None:
    """Fetch the weights of a model, an embedder or a reranker at their pinned revision; a second start resumes."""
    from labs.screen import say
    from pipelines import catalogue, weights
    from pipelines.config import names, unknown
    from pipelines.rag import embedders, places, rerankers

    if name in names("embedders"):
        folder = embedders.folder_of(embedders.find(name), pull=True, say=say)
    elif name in names("rerankers"):
        folder = places.obtain(rerankers.find(name), pull=True, say=say)
    elif name in names("models"):
        folder = weights.obtain(catalogue.runnable(name), pull=True, say=say)
    else:
        raise unknown("model, embedder or reranker", name, [*names("models"), *names("embedders"), *names("rerankers")])
    say(f"{name} is in {folder}")


@app.command()
def finetune(
    name: ModelName = "smollm2-135m",
    recipe: Annotated[str | None, typer.Option(help="A name from configs/recipes; the model's own if not given.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file of rows, a folder of documents, hub:OWNER/NAME, or a name in configs/data; the recipe's if not given."
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the file, in place of the recipe's steps.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval-data", help="A file of rows to hold out, in place of a share.")
    ] = None,
    start: Annotated[str, typer.Option(help="For dpo: the run whose adapter is tuned further.")] = "latest",
    resume: Annotated[Literal["auto", "never"], typer.Option(help="Go on from the newest checkpoint of this job?")] = "auto",
    processes: Annotated[int, typer.Option(min=1, max=64, help="How many processes share each step; on GPUs one for each.")] = 1,
    set_: Overrides = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Rehearse on a shrunk model with random weights.")] = False,
    pull: Annotated[Literal["auto", "never"], typer.Option(help="May weights be fetched?")] = "auto",
    metrics_port: Annotated[
        str, typer.Option(help="Where Prometheus finds the figures on 127.0.0.1: a port, auto (8090) or none.")
    ] = "auto",
) -> None:
    """Tune a model and write a run.

    Ctrl-C keeps a checkpoint; the same command goes on from it.

    Examples: llmlab finetune smollm2-135m --set schedule.steps=50;
    llmlab finetune --data faq.jsonl --epochs 3; llmlab finetune --data ~/notes --epochs 3; llmlab finetune --recipe dpo
    """
    from labs.metered import Metered, port_of
    from labs.screen import TuningScreen, say
    from pipelines.tune.finetune import Job
    from pipelines.tune.finetune import finetune as tune
    from pipelines.tune.hub import PREFIX, fetch

    if data and data.startswith(PREFIX):
        data = str(fetch(data, say))
    given = [f"data={data}"] if data else []
    given += [f"evaluation={evaluation}"] if evaluation else []
    given += [f"schedule.epochs={epochs}", "schedule.steps=null"] if epochs else []
    job = Job(name, recipe, (*given, *(set_ or ())), rehearse, pull != "never", start, resume != "never", processes)
    with TuningScreen() as screen, Metered(screen, port_of(metrics_port)) as watcher:
        run = tune(job, watcher)
    say(f"{'rehearsal' if run.rehearsal else 'run'} {run.id} is in {run.path}\n"
        f"loss {run.facts['final_loss']:.3f} after {run.facts['rows']} rows in {run.facts['seconds']:.0f} s; "
        + ("it cannot be served: its weights are random" if run.rehearsal else f"next: make eval MODEL={name}"))  # fmt: skip


@app.command("eval")
def eval_(
    name: ModelName = "smollm2-135m",
    run: Annotated[str | None, typer.Option(help="Id of a finetune run; the newest if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many questions.")] = None,
) -> None:
    """Measure a tuned model against its base on held-out questions; the last line is JSON."""
    from labs.screen import CountScreen, json_line, say
    from pipelines.evaluate.reader import evaluate

    with CountScreen() as screen:
        result = evaluate(tuned_run(name, run), limit, screen.update)
    show_scores(result.json("scores.json"))
    say(f"run {result.id}; chart and every reply are in {result.path}")
    json_line(result.facts)


def show_scores(scores: dict[str, dict[str, float]]) -> None:
    """Print the scores of each variant as a table."""
    from labs.screen import table

    columns = list(next(iter(scores.values())))
    table("Held-out questions", ["model", *columns], [[name, *(row[c] for c in columns)] for name, row in scores.items()])


@app.command()
def export(
    name: ModelName = "smollm2-135m",
    run: Annotated[str | None, typer.Option(help="Id of a finetune run; the newest if not given.")] = None,
    quantisation: Annotated[
        str | None,
        typer.Option(
            help="Of the GGUF file: f16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, or none; the model's own if not given."
        ),
    ] = None,
) -> None:
    """Make a tuned model a model of its own: merged, as GGUF, quantised, with a Modelfile for Ollama.

    Each step is compared with the one before; the last line is JSON.

    Examples: llmlab export; llmlab export smollm2-135m --quantisation q4_1; ollama create mine -f RUN/Modelfile
    """
    from labs.screen import CountScreen, json_line, say, table
    from pipelines import catalogue
    from pipelines.export.job import DIVERGENCE_FILE, NONE, STEPS
    from pipelines.export.job import export as make

    serving = catalogue.runnable(name).serving
    chosen = quantisation or (serving.quantisation if serving else NONE)
    with CountScreen() as screen:
        made = make(tuned_run(name, run), chosen, screen.update)
    rows = [(step, f"{d['mean']:.2e}", f"{d['worst']:.2e}", f"{d['same_first_choice']:.0%}")
            for step in STEPS if (d := made.json(DIVERGENCE_FILE).get(step))]  # fmt: skip
    table("Divergence from the step before (KL in nats)", ["step", "mean", "worst", "same first choice"], rows)
    say(f"{'rehearsal' if made.rehearsal else 'run'} {made.id} is in {made.path}")
    json_line(made.facts | {"run": made.id})


@app.command()
def serve(
    name: ModelName = "smollm2-135m",
    adapter: Annotated[
        list[str] | None, typer.Option(help="latest, none, or the id of a finetune or export run; again for more, NAME=RUN.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto, llamacpp, vllm or provider.")] = None,
    port: Port = None,
    set_: Overrides = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM file of a certificate; with --tls-key it is served as HTTPS.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file of its private key.")] = None,
) -> None:
    """Serve a model, its adapters and the index behind one API until Ctrl-C; a second Ctrl-C waits for nobody.

    Examples: llmlab serve --adapter 20260101T000000Z-0a1b2c3d --adapter faq=20260102T000000Z-4e5f6a7b;
    llmlab serve --engine provider --set provider.model=openai:gpt-4o-mini; llmlab serve gpt-4o --engine provider
    """
    from labs.screen import say
    from serving.launch import serve as run_server
    from serving.settings import load_serve_config

    given = [f"engine={engine}"] if engine else []
    given += [f"port={port}"] if port is not None else []
    given += [f"{field}={json.dumps(file)}" for field, file in (("tls_cert", tls_cert), ("tls_key", tls_key)) if file is not None]
    run_server(name, load_serve_config("default", [*(set_ or ()), *given]), adapter=adapter or "latest", say=say)


@app.command()
def ask(
    question: str,
    port: Port = None,
    k: Annotated[int | None, typer.Option(help="Passages to retrieve.")] = None,
    where: Annotated[str | None, typer.Option(help="Only passages that match, such as 'source like \"api/*\"'.")] = None,
) -> None:
    """Ask the running server and print the answer with its sources.

    Examples: llmlab ask "Who developed Falcon 40B?"; llmlab ask "How large is it?" --where 'source = "falcon-40b.md"'
    """
    from labs.ask import ask as send
    from labs.ask import show_answer
    from serving.settings import load_serve_config

    config = load_serve_config()
    show_answer(send(f"http://{config.host}:{port or config.port}", question, k, where))


@app.command()
def monitor(
    port: Port = None,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of a training's figures; 8090.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End what an earlier start left running.")] = False,
) -> None:
    """Start Prometheus on the running server and training, with Alertmanager and Grafana where they are, until Ctrl-C."""
    from labs.metered import PORT
    from labs.monitor import monitor as watch
    from labs.monitor import stop as end
    from labs.screen import say
    from monitoring.exporter import HOST
    from serving.settings import load_serve_config

    if stop:
        end(say)
        return
    config = load_serve_config()
    training = f"{HOST}:{PORT if metrics_port is None else metrics_port}"
    watch(f"{config.host}:{port or config.port}", training, say)


app.command("break")(break_)


@app.command()
def screenshots(name: ModelName = "smollm2-135m") -> None:
    """Take the picture of the page at / that the README shows; needs Chromium, an index and an adapter."""
    from labs.picture import take
    from labs.screen import say

    say(f"wrote {take(name)}")


@app.command()
def demo(recipe: Annotated[str, typer.Option(help="The recipe to tune with.")] = "lora-quick") -> None:
    """Take SmolLM2-135M through its whole life, offline, and write a report."""
    from labs.demo import demo as run_demo

    run_demo(recipe)


def _set_up_libraries() -> None:
    """Settings that libraries read when they are imported, and messages of theirs that no user can act on."""
    for name, value in OPENMP_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels that are not installed
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft to transformers


def _fail(message: str, status: int) -> None:
    from labs.screen import ERR

    ERR.print(message, style="red", markup=False)
    raise typer.Exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments`, or on those of the process."""
    _set_up_libraries()
    app(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="llmlab")
