"""`llmlab bench`: measured comparisons. Each prints tables and, as its last line, one JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipelines.runs import Run

bench_app = typer.Typer(no_args_is_help=True, help="Measured comparisons. Example: llmlab bench tune --quick")


@bench_app.command()
def tune(
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 5 minutes: short turns, few questions, no LLaMA-Factory.")
    ] = False,
    minutes: Annotated[float | None, typer.Option(min=0.05, help="Minutes of training for each; 7 if not given.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only these; may be given several times.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Test questions to ask each adapter; 64 if not given.")] = None,
) -> None:
    """Compare trainers on questions about paragraphs (XQuAD): speed, memory, quality for each minute, what is forgotten.

    Examples: llmlab bench tune --quick; llmlab bench tune --contender ours --minutes 2
    """
    from labs.bench import tune as bench
    from labs.screen import CountScreen, json_line, say

    names = bench.contenders(contender or [], quick=quick)
    length = minutes or (bench.QUICK_MINUTES if quick else bench.FULL_MINUTES)
    asked = questions or (bench.QUICK_QUESTIONS if quick else bench.FULL_QUESTIONS)
    say(f"{', '.join(names)}: {length:g} minutes of training each, one after the other")
    with CountScreen() as screen:
        document = bench.bench_tune(names, length, asked, quick=quick, progress=screen.update)
    _show(document)
    say(f"curves, logs and adapters are in {document['folder']}")
    json_line({k: v for k, v in document.items() if k not in ("loss", "folder")})


@bench_app.command()
def rag(
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 5 minutes: approximate search of 200,000 vectors only, no big corpus.")
    ] = False,
    vectors: Annotated[list[int] | None, typer.Option(min=1000, help="Sizes of the approximate search.")] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder of Debian's python3.11-doc, postgresql-doc-15, git-doc; else LLMLAB_CORPUS, /usr/share/doc."),
    ] = None,
    corpus_embedder: Annotated[
        str, typer.Option(help="Of the big corpus; wordllama takes minutes, not an hour.")
    ] = "minilm-int8",
) -> None:
    """Measure retrieval: what is found by words, vectors and both, and what it costs.

    Examples: llmlab bench rag --quick; llmlab bench rag --corpus /usr/share/doc
    """
    from labs.bench import rag as bench
    from labs.bench.rag_corpus import corpus_folder
    from labs.screen import CountScreen, json_line, say, table

    sizes = tuple(vectors or (bench.QUICK_VECTORS if quick else bench.FULL_VECTORS))
    with CountScreen() as screen:
        document = bench.bench_rag(sizes, None if quick else corpus_folder(corpus), corpus_embedder, screen.update)
    rows = [(name, method, *of.values()) for name, by_method in document["recall"].items() for method, of in by_method.items()]
    table("What is found", ["set", "method", "recall@1", "recall@5", "recall@10", "MRR", "nDCG@10"], rows)
    tried = [(option, *of.values()) for option, of in document["options"].items()]
    table("Options, on questions for testing", ["option", "recall@1", "MRR", "nDCG@10", "answer shown", "paragraphs in 5",
                                                "both in 4", "ms"], tried)  # fmt: skip
    if document["corpus"]:
        table("The big corpus", ["what", "value"], list(document["corpus"].items()))
    table("What it costs", ["what", "value"], [(key, value) for key, value in document.items() if isinstance(value, float)])
    made = [(name, *of.values()) for name, of in document["embedders"].items()]
    table("Embedders", ["embedder", "times torch", "one question, times torch", "passages/s", "ms a question", "nDCG@10"], made)
    found = [(size, kind, *of.values()) for size, by_kind in document["ann"].items() for kind, of in by_kind.items()]
    table(
        "Approximate search", ["vectors", "kind", "recall@10", "times flat", "ms", "bytes", "memory", "build s", "breadth"], found
    )
    for what, way in document["left_out"].items():
        say(f"left out: {what} ({way})")
    json_line(document)


@bench_app.command()
def answers(
    name: Annotated[str, typer.Argument(help="A name from `llmlab models`.")] = "smollm2-135m",
    quick: Annotated[bool, typer.Option("--quick", help="Under 5 minutes: a quarter of the questions.")] = False,
    run: Annotated[str | None, typer.Option(help="Id of a finetune run; the newest if not given.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Test questions for each model; 100 if not given.")] = None,
    unanswerable: Annotated[
        int | None, typer.Option(min=1, help="How many are asked again without what answers them; 50 if not given.")
    ] = None,
    learn: Annotated[
        float | None, typer.Option(min=0.01, help="Tune a reader on the training articles first, for so many epochs.")
    ] = None,
) -> None:
    """Measure answers from retrieved passages (XQuAD), base against tuned: quality, citations, abstention.

    Examples: llmlab bench answers --quick; llmlab bench answers --learn 2; llmlab bench answers smollm2-135m --questions 200
    """
    from labs.bench import answers as bench
    from labs.runs import tuned_run
    from labs.screen import CountScreen, json_line, say

    asked = questions or (bench.QUICK_QUESTIONS if quick else bench.FULL_QUESTIONS)
    without = unanswerable or (bench.QUICK_UNANSWERABLE if quick else bench.FULL_UNANSWERABLE)
    tuned = _learned(name, learn) if learn else tuned_run(name, run)
    with CountScreen() as screen:
        document = bench.bench_answers(tuned, asked, without, screen.update, say)
    _show_answers(document)
    json_line(document)


@bench_app.command()
def watch(
    requests: Annotated[int, typer.Option(min=100, help="Requests of strangers, with names made up for each.")] = 10_000,
) -> None:
    """Measure what watching costs: series after many made-up names, time and processor time of a scrape.

    Example: llmlab bench watch --requests 2000
    """
    from labs.bench import watch as bench
    from labs.screen import json_line, table

    document = bench.bench_watch(requests)
    rows = [
        ("series", document["series_after"], f"at most {bench.MOST_SERIES}"),
        ("longest scrape", f"{document['scrape_max_seconds'] * 1000:.0f} ms", f"under {bench.MOST_SCRAPE_SECONDS * 1000:.0f} ms"),
        ("share of a core", f"{document['cpu_share_of_a_core']:.2%}", f"under {bench.MOST_CPU_SHARE:.0%}"),
    ]
    table(f"Watching, after {requests} requests", ["what", "measured", "wanted"], rows)
    json_line(document)


@bench_app.command()
def guard(
    rounds: Annotated[int, typer.Option(min=10, help="How often each figure is taken.")] = 200,
) -> None:
    """Measure what the guards cost: milliseconds for a prompt of 2,000 tokens, its passages, and each chunk of a stream.

    Example: llmlab bench guard
    """
    from labs.bench.guard import bench_guard
    from labs.screen import json_line, table

    document = bench_guard(rounds)
    rows = [
        (name, stage, of["p50_ms"], of["p99_ms"]) for name, stages in document["guards"].items() for stage, of in stages.items()
    ]
    table(f"Guards, {rounds} rounds", ["guards", "stage", "p50 ms", "p99 ms"], rows)
    json_line(document)


@bench_app.command()
def serve(
    name: Annotated[str, typer.Argument(help="A name from `llmlab models`.")] = "smollm2-135m",
    quick: Annotated[bool, typer.Option("--quick", help="Under 5 minutes: short turns, two loads, 200 mixed requests.")] = False,
    contender: Annotated[list[str] | None, typer.Option(help="Beside engine and gateway; may be given several times.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.5, help="Of each turn and load.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Mixed requests; with --url those of the load, 100.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure this OpenAI endpoint instead; its key is LLMLAB_BENCH_KEY.")] = None,
    model: Annotated[str, typer.Option(help="With --url: value of `model`; the first that is listed if not given.")] = "",
    rate: Annotated[float, typer.Option(min=0.001, help="With --url: requests a second.")] = 1.0,
    reply_tokens: Annotated[int, typer.Option(min=1, help="With --url: longest reply.")] = 64,
    good_ttft: Annotated[float, typer.Option(help="With --url: a good request's longest TTFT, in seconds.")] = 1.0,
    good_tpot: Annotated[float, typer.Option(help="With --url: a good request's longest TPOT, in seconds.")] = 0.1,
) -> None:
    """Measure serving: llama.cpp itself, our gateway before it, `transformers serve`, vLLM; or one endpoint from outside.

    Examples: llmlab bench serve --quick; llmlab bench serve --url http://127.0.0.1:8000 --rate 4 --requests 200
    """
    import asyncio
    import os
    from dataclasses import replace

    from labs.bench import serve as bench
    from labs.bench.serve_figures import Limits
    from labs.bench.serve_load import Target
    from labs.screen import CountScreen, json_line, say

    if url:
        target = Target(url.rstrip("/").removesuffix("/v1"), model, os.environ.get("LLMLAB_BENCH_KEY", ""))
        limits = Limits(good_ttft, good_tpot)
        document = asyncio.run(bench.bench_endpoint(target, rate, requests or 100, reply_tokens, limits))
        _show_load(document)
    else:
        usual = bench.QUICK if quick else bench.FULL
        sizes = replace(usual, window_seconds=seconds or usual.window_seconds, side_seconds=seconds or usual.side_seconds,
                        load_seconds=seconds or usual.load_seconds, requests=requests or usual.requests)  # fmt: skip
        with CountScreen() as screen:
            document = bench.bench_serve(name, sizes, bench.chosen(contender), screen.update, say, quick=quick)
        _show_serving(document)
        if plot:
            bench.draw(document, plot)
    json_line(document)


@bench_app.command()
def parity(
    name: Annotated[str, typer.Argument(help="A name from `llmlab models`.")] = "smollm2-135m",
    run: Annotated[str | None, typer.Option(help="Id of an export run, to take in place of the base.")] = None,
    quantisation: Annotated[list[str] | None, typer.Option(help="f16, q8_0 and q4_1 if not given; several times.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many of the golden prompts; all if not given.")] = None,
    with_vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Ask vLLM too, where it is installed.")] = True,
) -> None:
    """Measure what a quantisation costs: transformers in float32 against llama.cpp and vLLM, on golden prompts.

    Examples: llmlab bench parity; llmlab bench parity --quantisation q8_0 --quantisation q4_k
    """
    from labs.bench import parity as bench
    from labs.screen import CountScreen, json_line, say, table
    from pipelines import runs
    from pipelines.export import quantise

    for each in quantisation or ():
        quantise.check(each)
    with CountScreen() as screen:
        document = bench.bench_parity(name, runs.find(run) if run else None, quantisation or bench.QUANTISATIONS, prompts,
                                      screen.update, with_vllm=with_vllm)  # fmt: skip
    columns = list(dict.fromkeys(key for form in document["forms"].values() for key in form))
    rows = [(of, *("-" if form.get(c) is None else form[c] for c in columns)) for of, form in document["forms"].items()]
    shown = ["form", *(column.replace("_", " ") for column in columns)]
    table(f"Against transformers in float32, {document['prompts']} prompts", shown, rows)
    say(f"recommended: {document['recommended']}")
    json_line(document)


def _show_load(document: dict[str, Any]) -> None:
    from labs.screen import table

    parts = {key: of for key, of in document.items() if isinstance(of, dict)}
    rows = [(key.removesuffix("_seconds"), *("-" if v is None else v for v in of.values())) for key, of in parts.items()]
    table("Seconds", ["of", "mean", "p50", "p90", "p99"], rows)
    table("Load", ["what", "value"], [(key, value) for key, value in document.items() if key not in parts])


def _show_serving(document: dict[str, Any]) -> None:
    from labs.screen import say, table

    speed, loads = document["tokens_per_second"], document["loads"]
    streams = list(speed["engine"])
    table("Tokens a second", ["server", *(f"{n} streams" for n in streams)],
          [(name, *(f"{of[n]:.1f}" for n in streams)) for name, of in speed.items()])  # fmt: skip
    rows = [
        (
            load,
            f"{of['rate']:.2f}",
            of["completed"],
            of["refused"],
            of["server_errors"],
            *("-" if of["ttft_seconds"][p] is None else of["ttft_seconds"][p] for p in ("p50", "p99")),
        )
        for load, of in loads.items()
    ]
    table("The gateway under load", ["times rated", "requests/s", "completed", "refused", "errors", "TTFT p50", "p99"], rows)
    figures = [(key, value) for key, value in document.items() if isinstance(value, float)]
    table("Figures", ["what", "value"], [*figures, *document["leaked"].items()])
    for what, way in document["left_out"].items():
        say(f"left out: {what} ({way})")


def _learned(name: str, epochs: float) -> Run:
    """Return a run that has learned to read the training articles; it is kept among the user's runs."""
    from labs.bench import answers as bench
    from labs.screen import CountScreen, TuningScreen
    from pipelines.tune.finetune import Job, finetune

    with CountScreen() as screen:
        rows = bench.reader_rows(screen.update)
    settings = [f"data={rows}", f"schedule.epochs={epochs}", "schedule.steps=null"]
    with TuningScreen() as watcher:
        return finetune(Job(name, "lora", settings, pull=False), watcher)


def _show_answers(document: dict[str, Any]) -> None:
    from labs.bench.answers import KINDS, WHO_ABSTAINS
    from labs.screen import table

    shares = [key for key in document["tuned"] if key != "counts"]
    rows = [(key.replace("_", " "), *(document[kind][key] for kind in KINDS)) for key in shares]
    table(f"{document['questions']} questions, {document['unanswerable']} unanswerable", ["share", *KINDS], rows)
    who = [(f"{part}, by {who}", *(document[kind]["counts"][f"abstained_{part}"][who] for kind in KINDS))
           for part in ("answerable", "unanswerable") for who in WHO_ABSTAINS]  # fmt: skip
    table("Abstained from", ["questions", *KINDS], who)


def _show(document: dict[str, Any]) -> None:
    from labs.screen import table

    speed, memory = document["examples_per_second"], document["peak_rss_bytes"]
    supervised, total = document["supervised_tokens_per_second"], document["total_tokens_per_second"]
    table("Trainers", ["trainer", "examples/s", "supervised tok/s", "tok/s", "peak GB", "F1", "exact match", "general loss"],
          [(name, f"{speed[name]:.2f}", f"{supervised[name]:.1f}", f"{total[name]:.0f}", f"{memory[name] / 1e9:.2f}",
            document["test_f1"][name], document["test_exact_match"][name], f"{document['forgetting'][name]['general']:+.2f}")
           for name in speed])  # fmt: skip
    points = [(name, p["minutes"], p["steps"], p["examples"], p["f1"], p["exact_match"])
              for name, curve in document["curve"].items() for p in curve]  # fmt: skip
    table(f"F1 over minutes (base {document['base_f1']:.3f})", ["trainer", "minutes", "steps", "examples", "F1", "exact match"],
          points)  # fmt: skip
    ratios = [(key, document[key]) for key in document if key.startswith("ratio_") or key == "peak_rss_ratio"]
    gaps = [(key, f"{document[key]:.1e}") for key in ("packed_loss_gap", "packed_gradient_gap")]
    table("Ratios and gaps", ["what", "value"], [*ratios, *gaps])
