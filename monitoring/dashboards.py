"""Build the Grafana dashboards from the declared metrics.

The plots are the table `SECTIONS`; metric names come from `monitoring.metrics`, so a renamed metric renames
its plot. Nothing here talks to Grafana: the JSON is written to disk, committed, and read by Grafana's file
provisioning.

    llmlab dashboards            # write monitoring/grafana/dashboards/overview.json
    llmlab dashboards --check    # exit status 1 when the file on disk differs
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, BigValueTextMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef
from prometheus_client import Counter, Gauge, Histogram

from monitoring import metrics as m

DIRECTORY = Path(__file__).parent / "grafana" / "dashboards"
DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Grafana replaces it with at least four scrape intervals, so that a rate always has samples.
WINDOW = "$__rate_interval"
PANEL_HEIGHT = 8


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Plot:
    """One panel: what it shows, in which unit, and what a reader does about a bad value.

    `width` is in columns of Grafana's 24; "name" shows the legend instead of a value.
    """

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    kind: Literal["line", "value", "name"] = "line"
    width: int = 6


def rate(metric: Counter, by: str = "", where: str = "") -> str:
    """Return the PromQL for events per second of a counter, summed by the labels `by`."""
    return f"sum{_by(by)}(rate({m.series_name(metric)}{_where(where)}[{WINDOW}]))"


def quantile(fraction: float, metric: Histogram, by: str = "") -> str:
    """Return the PromQL for a quantile (0 to 1) of a histogram, by the labels `by`."""
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({m.series_name(metric)}_bucket[{WINDOW}])"
    return f"histogram_quantile({fraction}, sum by ({labels}) ({buckets}))"


def mean(metric: Histogram) -> str:
    """Return the PromQL for the mean observation of a histogram."""
    name = m.series_name(metric)
    return f"sum(rate({name}_sum[{WINDOW}])) / sum(rate({name}_count[{WINDOW}]))"


def share(metric: Counter, where: str) -> str:
    """Return the PromQL for the share (0 to 1) of a counter's events matching `where`; NaN without events."""
    return f"({rate(metric, where=where)} or vector(0)) / {rate(metric)}"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


def _where(matcher: str) -> str:
    return f"{{{matcher}}}" if matcher else ""


def _p50_p95(metric: Histogram, by: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, metric, by), f"p{q * 100:.0f} {{{{{by}}}}}") for q in (0.5, 0.95))


def _newest(metric: Gauge) -> str:
    return f"max({m.series_name(metric)})"


def _training(metric: Gauge) -> tuple[Query, ...]:
    return (Query(m.series_name(metric), "{{model}}, {{recipe}}"),)


SERVICE = (
    Plot(
        "Requests per second by route",
        "reqps",
        "Zero under load means that nothing reaches the gateway: check `make serve` and the client's address.",
        (Query(rate(m.HTTP_REQUESTS, by="route"), "{{route}}"),),
    ),
    Plot(
        "Error ratio",
        "percentunit",
        "Share of requests answered with a 5xx status. Above 5 % users notice: look at 'Engine up' first, "
        "then at the gateway's log.",
        (Query(share(m.HTTP_REQUESTS, 'status=~"5.."'), "5xx"),),
    ),
    Plot(
        "Request latency by route",
        "s",
        "p95 far above p50 means queueing: compare with 'Requests in flight', then lower the concurrency limit or add an engine.",
        _p50_p95(m.HTTP_REQUEST_DURATION, "route"),
    ),
    Plot(
        "Requests in flight",
        "short",
        "A value that only rises means that requests arrive faster than they finish: clients should back "
        "off, or the limit is too high.",
        (
            Query(f"sum({m.series_name(m.HTTP_REQUESTS_IN_FLIGHT)})", "in flight"),
            Query(f"sum({m.series_name(m.GATEWAY_TASKS)})", "tasks of the gateway"),
        ),
    ),
)

GENERATION = (
    Plot(
        "Places",
        "short",
        "Waiting above zero for long: more arrives than the engine can do, so add a replica or slots. Running above zero "
        "while nobody asks: a place has leaked.",
        (
            Query(f"sum({m.series_name(m.ADMISSION_RUNNING)})", "running"),
            Query(f"sum({m.series_name(m.ADMISSION_WAITING)})", "waiting"),
        ),
        width=8,
    ),
    Plot(
        "Wait for a place",
        "s",
        "p95 near wait_seconds means that the queue is full most of the time: users wait as long as they are made to.",
        (Query(quantile(0.5, m.ADMISSION_WAIT), "p50"), Query(quantile(0.95, m.ADMISSION_WAIT), "p95")),
        width=8,
    ),
    Plot(
        "Refused with 429",
        "reqps",
        "queue, queued_tokens, wait, connections: the engine is too small for the load. key_requests, "
        "key_tokens: one key is over its own limit, see `llmlab keys list`.",
        (Query(rate(m.ADMISSION_REFUSED, by="reason"), "{{reason}}"),),
        width=8,
    ),
    Plot(
        "Generations by outcome",
        "reqps",
        "error: see the engine's log. cancelled: clients give up, so look at TTFT. refused: the guard or a "
        "limit said no; if these are honest users, loosen it.",
        (Query(rate(m.GENERATION_REQUESTS, by="outcome"), "{{outcome}}"),),
    ),
    Plot(
        "Time to first token",
        "s",
        "Seconds mean long prompts or a full queue: shorten the context, reuse the prefix, or lower the concurrency.",
        _p50_p95(m.GENERATION_TTFT, "model"),
    ),
    Plot(
        "Generation duration",
        "s",
        "Rising while tokens per second are flat means longer answers: lower max_tokens. Rising while they "
        "fall means that the engine is short of memory bandwidth.",
        _p50_p95(m.GENERATION_DURATION, "model"),
    ),
    Plot(
        "Tokens per second",
        "suffix: tok/s",
        "Generated tokens falling at constant traffic: the machine is shared or throttled. Prompt tokens "
        "far above generated ones: prefill is the cost, so cut the context.",
        (Query(rate(m.GENERATED_TOKENS), "generated"), Query(rate(m.PROMPT_TOKENS), "prompt")),
    ),
)

RETRIEVAL = (
    Plot(
        "RAG questions by outcome",
        "reqps",
        "Many abstained: the index does not hold the answers, or the score threshold is too high. Errors: "
        "look at the stage that stopped in 'RAG stage latency'.",
        (Query(rate(m.RAG_REQUESTS, by="outcome"), "{{outcome}}"),),
    ),
    Plot(
        "RAG stage latency",
        "s",
        "Generate should dominate. A slow embed means that the CPU is oversubscribed; a slow search means "
        "that the index has outgrown a flat scan.",
        _p50_p95(m.RAG_STAGE_DURATION, "stage"),
    ),
    Plot(
        "Chunks per question",
        "short",
        "Near zero: the filter or the threshold removes everything. At the configured top-k always: the "
        "threshold does nothing, and each chunk costs prefill time.",
        (Query(mean(m.RAG_HITS), "mean"), Query(quantile(0.5, m.RAG_HITS), "p50")),
    ),
    Plot(
        "Score of the best chunk",
        "none",
        "A fall after a new index or embedder means that questions and chunks no longer match: evaluate "
        "retrieval before serving that index.",
        (Query(quantile(0.5, m.RAG_TOP_SCORE), "p50"), Query(quantile(0.1, m.RAG_TOP_SCORE), "p10")),
    ),
    Plot(
        "Invalid citation ratio",
        "percentunit",
        "Share of citations that name a chunk the model was not given. Above a few percent the model "
        "invents sources: tune the reader or tighten the prompt.",
        (Query(share(m.RAG_CITATIONS, 'valid="no"'), "invalid"),),
        width=8,
    ),
    Plot(
        "Index chunks",
        "short",
        "Zero means that no index is loaded: build one with `make index`. A sudden drop means that sources went missing.",
        (Query(_newest(m.INDEX_CHUNKS), "chunks"),),
        kind="value",
        width=8,
    ),
    Plot(
        "Index age",
        "s",
        "Older than the documents change means stale answers: run `make index` again. No value: no index is loaded.",
        (Query(f"time() - max({m.series_name(m.INDEX_CREATED)} > 0)", "age"),),
        kind="value",
        width=8,
    ),
)

ENGINE = (
    Plot(
        "Engine up",
        "bool_yes_no",
        "No means that the engine does not answer its health check: read its log, then start again with `make serve`.",
        (Query(f"min by (engine) ({m.series_name(m.ENGINE_UP)})", "{{engine}}"),),
        kind="value",
    ),
    Plot(
        "Engine restarts in the last hour",
        "short",
        "Anything above zero is a crash, most often out of memory: lower the context length or the number of slots.",
        (Query(f"sum by (engine) (increase({m.series_name(m.ENGINE_RESTARTS)}[1h]))", "{{engine}}"),),
        kind="value",
    ),
    Plot(
        "Engine circuit open",
        "short",
        "One: the engine failed several times in a row and is tried again only after a pause. Its log says why, "
        "GET /readyz when.",
        (Query(m.series_name(m.ENGINE_CIRCUIT_OPEN), "{{engine}}"),),
        kind="value",
    ),
    Plot(
        "Adapter changes in the last hour",
        "short",
        "Adapters added and removed over the API. A failed change left everything as it was; its answer says why.",
        (Query(f"sum by (change, outcome) (increase({m.series_name(m.ADAPTER_CHANGES)}[1h]))", "{{change}}: {{outcome}}"),),
        kind="value",
    ),
    Plot(
        "Engine and why",
        "none",
        "The engine that was chosen at the start, and the reason. If it is not the expected one, the reason"
        " says what to install.",
        (Query(m.series_name(m.ENGINE_INFO), "{{engine}}: {{reason}}"),),
        kind="name",
    ),
    Plot(
        "Version",
        "none",
        "More than one version at a time means that an old gateway still runs: stop it.",
        (Query(f"count by (version) ({m.series_name(m.BUILD_INFO)})", "{{version}}"),),
        kind="name",
    ),
)

GUARDS = (
    Plot(
        "Guard findings per second",
        "suffix: findings/s",
        "Secrets in the output come from prompts or documents: find which. Many orders in the input: somebody tries the model. "
        "block rising among honest users: set that guard to report.",
        (Query(rate(m.GUARD_DECISIONS, by="guard, stage, action"), "{{guard}}, {{stage}}: {{action}}"),),
        width=12,
    ),
    Plot(
        "Guard latency",
        "s",
        "Milliseconds are usual for long prompts. More: run `llmlab bench guard`, and turn off what is not needed.",
        _p50_p95(m.GUARD_DURATION, "stage"),
        width=12,
    ),
)

TRAINING = (
    Plot(
        "Training loss",
        "none",
        "It falls quickly, then slowly, with noise between steps. A rise that stays means that the learning rate is too high: "
        "Ctrl-C, then --set optimiser.learning_rate with a third of it.",
        _training(m.TRAINING_LOSS),
    ),
    Plot(
        "Gradient norm",
        "none",
        "Before clipping. Always above max_gradient_norm: every step is clipped, so the learning rate counts for less than it "
        "says. Zero: nothing is learnt.",
        _training(m.TRAINING_GRADIENT_NORM),
    ),
    Plot(
        "Learning rate",
        "none",
        "Warm-up, then a cosine to zero. Another shape means that the run was resumed with another recipe.",
        _training(m.TRAINING_LEARNING_RATE),
    ),
    Plot(
        "Training tokens per second",
        "suffix: tok/s",
        "A fall at even rows means that the machine is shared or throttled, or has begun to swap: look at the memory beside it.",
        _training(m.TRAINING_TOKENS_PER_SECOND),
    ),
    Plot(
        "Training progress",
        "percentunit",
        "Steps done of steps planned. If it stands still, look at the training's terminal: the alert says so after ten minutes.",
        (Query(f"{m.series_name(m.TRAINING_STEPS_DONE)} / {m.series_name(m.TRAINING_STEPS_PLANNED)}", "{{model}}, {{recipe}}"),),
        kind="value",
    ),
    Plot(
        "Training time left",
        "s",
        "At the mean pace so far. Too long: fewer schedule.steps, or NPROC=2 on a CPU with free cores.",
        _training(m.TRAINING_ETA),
        kind="value",
    ),
    Plot(
        "Rows learnt per second",
        "suffix: rows/s",
        "Falls when rows get longer, although tokens per second stay: then there is nothing to repair.",
        (Query(rate(m.TRAINING_ROWS, by="model, recipe"), "{{model}}, {{recipe}}"),),
    ),
    Plot(
        "Training peak memory",
        "bytes",
        "Near the machine's memory: lower schedule.max_tokens or schedule.sequences_at_once before it is killed.",
        _training(m.TRAINING_PEAK_MEMORY),
    ),
)

SECTIONS = {"Service": SERVICE, "Generation": GENERATION, "Retrieval": RETRIEVAL, "Guards": GUARDS, "Engine": ENGINE,
            "Training": TRAINING}  # fmt: skip


def overview() -> dashboard.Dashboard:
    """Return the builder of the dashboard "LLM Lab overview"."""
    board = (
        dashboard.Dashboard("LLM Lab overview")
        .uid("llmlab-overview")
        .description("Requests, generation, retrieval and the engine of one gateway, and the training that runs beside it.")
        .tags(["llmlab", "generated"])
        .readonly()
        .refresh("5s")
        .time("now-30m", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    number = 0
    for title, plots in SECTIONS.items():
        number += 1
        board.with_row(dashboard.Row(title).id(number))
        for plot in plots:
            number += 1
            board.with_panel(_panel(plot).id(number))
    return board


def render() -> dict[str, str]:
    """Return the text of each dashboard by file name; the same metrics always give the same text."""
    text = json.dumps(overview().build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
    return {"overview.json": text + "\n"}


def write(directory: Path = DIRECTORY) -> list[Path]:
    """Write every dashboard to `directory`, which is created if need be; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in render().items():
        (directory / name).write_text(text, encoding="utf-8")
        files.append(directory / name)
    return files


def check(directory: Path = DIRECTORY) -> list[Path]:
    """Return the files in `directory` that are missing, differ from what `write` gives, or are stale."""
    rendered = render()
    stale = [path for path in sorted(directory.glob("*.json")) if path.name not in rendered]
    return [directory / name for name, text in rendered.items() if _read(directory / name) != text] + stale


def panel_expressions(window: str = "1m") -> Iterator[tuple[str, str]]:
    """Yield (panel title, PromQL) of every query, with `window` in the place of Grafana's variable."""
    for plots in SECTIONS.values():
        for plot in plots:
            for query in plot.queries:
                yield plot.title, query.expr.replace(WINDOW, window)


def _panel(plot: Plot) -> timeseries.Panel | stat.Panel:
    panel = timeseries.Panel().fill_opacity(10) if plot.kind == "line" else _stat(plot)
    panel.title(plot.title).description(plot.description).unit(plot.unit).datasource(DATA_SOURCE)
    panel.height(PANEL_HEIGHT).span(plot.width)
    if plot.kind == "line":
        panel.min(0)
    for number, query in enumerate(plot.queries):
        target = prometheus.Dataquery().ref_id("ABCDEFGH"[number])
        target.expr(query.expr).legend_format(query.legend)
        panel.with_target(target if plot.kind == "line" else target.instant())
    return panel


def _stat(plot: Plot) -> stat.Panel:
    text = BigValueTextMode.NAME if plot.kind == "name" else BigValueTextMode.VALUE_AND_NAME
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().graph_mode(BigValueGraphMode.NONE).text_mode(text).reduce_options(last)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
