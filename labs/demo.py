"""The whole life of a model in a few minutes, offline: `make demo`

doctor -> finetune -> eval -> index -> serve -> three questions -> metrics -> stop -> report. The steps are those of the other
commands, with a short recipe and a sample of the held-out questions; the report says what the full recipe reaches.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labs import screen
from labs.ask import ask, show_answer
from pipelines.config import ROOT, load, named
from pipelines.errors import LabError
from pipelines.runs import Run

MODEL = "smollm2-135m"
EVAL_QUESTIONS = 36
FULL_RECIPE = ROOT / "labs" / "measured" / "lora.json"
REPORTS = ROOT / "reports"
QUESTIONS = (
    "Who developed Phi-2?",
    "What are the use cases of Claude 3.7 Sonnet?",
    "What is the boiling point of ethanol?",
)
SHOWN_METRICS = (
    "llmlab_http_requests_total", "llmlab_rag_requests_total", "llmlab_prompt_tokens_total", "llmlab_generated_tokens_total",
    "llmlab_generation_ttft_seconds_sum", "llmlab_generation_ttft_seconds_count", "llmlab_rag_citations_total",
    "llmlab_index_chunks", "llmlab_engine_up",
)  # fmt: skip


class Stopwatch:
    """Seconds of each named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        screen.say(f"\n== {name}")
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


def demo(recipe: str) -> Path:
    """Run the demo and return the folder of its report.

    Raises:
        LabError: a stage failed; what was finished before it stays.
    """
    watch = Stopwatch()
    with watch.stage("doctor"):
        _check_machine()
    with watch.stage("finetune"):
        tuned = _finetune(recipe)
    with watch.stage("eval"):
        evaluation = _evaluate(tuned)
    with watch.stage("index"):
        chunks = _index()
    with watch.stage("serve and ask"):
        answers, metrics = _serve_and_ask(tuned)
    with watch.stage("report"):
        folder = REPORTS / f"demo-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        folder.mkdir(parents=True)
        draw(tuned, evaluation, watch.seconds, folder / "report.png")
        text = report(recipe, tuned, evaluation, chunks, answers, metrics, watch.seconds)
        (folder / "report.md").write_text(text, encoding="utf-8")
    screen.say(f"report: {folder / 'report.md'}")
    given = {"answers": [a["answer"] for a in answers], "abstained": [a["abstained"] for a in answers]}
    screen.json_line(
        evaluation.facts | given | {"seconds": watch.seconds, "total_seconds": round(sum(watch.seconds.values()), 1)}
    )
    return folder


def _check_machine() -> None:
    from labs.doctor import examine

    findings = examine()
    for f in findings:
        screen.say(f"{f.mark:8}{f.what}: {f.found}" + ("" if f.ok else f"  -> {f.fix}"))
    missing = [f for f in findings if f.required and not f.ok]
    if missing:
        raise LabError("this machine lacks " + ", ".join(f.what for f in missing), "what the list above says", missing[0].fix)


def _finetune(recipe: str) -> Run:
    from pipelines.tune.finetune import Job, finetune

    with screen.TuningScreen() as watcher:
        return finetune(Job(MODEL, recipe, pull=False), watcher)


def _evaluate(tuned: Run) -> Run:
    from labs.cli import show_scores
    from pipelines.evaluate.reader import evaluate

    with screen.CountScreen() as bars:
        result = evaluate(tuned, EVAL_QUESTIONS, bars.update)
    show_scores(result.json("scores.json"))
    return result


def _index() -> int:
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import RagConfig, sync
    from pipelines.tune.data import KNOWLEDGE

    config = load(named("rag", "default"), RagConfig)
    with screen.CountScreen() as bars:
        done = sync(KNOWLEDGE, "knowledge", config, load_embedder(config.embedder), bars.update)
    screen.say(f"{done.chunks} chunks of {done.documents} documents, {done.change.to_embed} embedded")
    return done.chunks


def _serve_and_ask(tuned: Run) -> tuple[list[dict[str, Any]], dict[str, float]]:
    from serving.launch import running
    from serving.settings import load_serve_config

    config = load_serve_config("default", ["port=0", "engine_port=0", "keys=null"])
    answers = []
    with running(MODEL, config, adapter=tuned.id, say=screen.say) as server:
        for question in QUESTIONS:
            screen.OUT.print(f"\n> {question}", markup=False)
            answers.append({"question": question} | ask(server.url, question))
            show_answer(answers[-1])
        metrics = scrape(server.url)
    screen.table("Metrics of this visit", ["series", "value"], [(name, f"{value:g}") for name, value in metrics.items()])
    return answers, metrics


def scrape(server: str) -> dict[str, float]:
    """Return the non-zero series of `SHOWN_METRICS` from a server's /metrics, by series name with its labels."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server}/metrics", trust_env=False).text):
        for sample in family.samples:
            if sample.name in SHOWN_METRICS and sample.value:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def draw(tuned: Run, evaluation: Run, seconds: dict[str, float], path: Path) -> None:
    """Draw loss, scores and the time of each stage side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, scores, times = figure.subplots(1, 3)
    rows = [json.loads(line) for line in (tuned.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss.plot([r["step"] for r in rows], [r["loss"] for r in rows])
    loss.set(title="Fine-tuning", xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    facts = evaluation.facts
    names = ["f1_closed_book", "f1_base", "f1_tuned", "citation_accuracy", "abstention_f1"]
    bars = scores.bar([n.replace("_", "\n") for n in names], [facts[n] for n in names])
    scores.bar_label(bars, fmt="%.2f")
    scores.set(title=f"{facts['test_questions']} questions about models it never saw", ylim=(0, 1.1))
    times.barh(list(seconds)[::-1], list(seconds.values())[::-1])
    times.set(title="Time", xlabel="seconds")
    figure.savefig(path, dpi=110)


def report(recipe: str, tuned: Run, evaluation: Run, chunks: int, answers: list[dict[str, Any]], metrics: dict[str, float],
           seconds: dict[str, float]) -> str:  # fmt: skip
    """Return the report as Markdown."""
    lines = [
        f"# The life of {MODEL}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "", "![loss, scores, time](report.png)", "",
        f"Tuned with the recipe `{recipe}`: {tuned.facts['rows']} questions in {tuned.facts['seconds']:.0f} s, "
        f"{tuned.facts['tokens_per_second']:.0f} tokens/s, peak memory {tuned.facts['peak_memory_bytes'] / 1e9:.1f} GB. "
        f"Run `{tuned.id}`; index of {chunks} chunks.", "", "## What it can do now", "",
        *_score_table(evaluation.facts), "", *_about_full_recipe(recipe), "", "## What it answered", "",
    ]  # fmt: skip
    for a in answers:
        sources = (
            "; ".join(f"[{c['number']}] {c['title']}, score {c['score']:.2f}" for c in a["citations"])
            or "no source: it abstained"
        )
        lines.append(f"- **{a['question']}** {a['answer']} ({sources}; {a['timings']['total_seconds']:.1f} s)")
    lines += ["", "## What was counted", "", *(f"- `{name}` {value:g}" for name, value in metrics.items())]
    lines += [
        "",
        "## Where the time went",
        "",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {n} | {s:.0f} |" for n, s in seconds.items()),
    ]
    lines += ["", "## What to try next", "",
              "- `make finetune && make eval`: the full recipe on all held-out questions",
              "- `make serve`, then `make ask Q=\"...\"`, or open http://127.0.0.1:8000/docs",
              "- `make index DOCS=path/to/your/documents`: your own knowledge base",
              "- `make monitor`: the same numbers over time",
              "- `make finetune MODEL=mistral-7b`: what a 7-billion model would need on this machine", ""]  # fmt: skip
    return "\n".join(lines)


def _score_table(facts: dict[str, Any]) -> list[str]:
    rows = [("token F1, base", "f1_base"), ("token F1, tuned", "f1_tuned"), ("token F1 without passages", "f1_closed_book"),
            ("citation accuracy, tuned", "citation_accuracy"), ("abstention F1, tuned", "abstention_f1")]  # fmt: skip
    return ["| measure | value |", "|---|---:|", *(f"| {label} | {facts[key]:.2f} |" for label, key in rows),
            f"| questions | {facts['test_questions']} |"]  # fmt: skip


def _about_full_recipe(recipe: str) -> list[str]:
    if recipe == "lora":
        return []
    full = json.loads(FULL_RECIPE.read_text(encoding="utf-8"))
    return [
        f"`{recipe}` is short, and so is this sample of the questions. The full recipe (`{full['command']}`) was measured on "
        f"{full['test_questions']} questions: token F1 {full['f1_tuned']:.2f} against {full['f1_base']:.2f} of the base, "
        f"citation accuracy {full['citation_accuracy']:.2f}, abstention F1 {full['abstention_f1']:.2f}."
    ]
