"""Serving: generations as the gateway sees them, the twelve panels of vLLM's own dashboard for any engine, and guards."""

from __future__ import annotations

from monitoring import metrics as m
from monitoring.dashboards.plots import Board, Plot, Query, Variable, increase, p50_p95, quantile, rate, total

MODEL, ENGINE = 'model=~"$model"', 'engine=~"$engine"'
BOTH = f"{ENGINE}, {MODEL}"


def _engine(series: str, by: str = "engine") -> str:
    return f"sum by ({by}) ({series}{{{ENGINE}}})"


def _engine_quantiles(name: str) -> tuple[Query, ...]:
    buckets = f"sum by (le, engine) (engine:{name}_bucket:rate1m{{{BOTH}}})"
    found = [Query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f} {{{{engine}}}}") for q in (0.99, 0.95, 0.9, 0.5)]
    total_time = f"sum by (engine) (engine:{name}_sum:rate1m{{{BOTH}}})"
    events = f'sum by (engine) (engine:{name}_bucket:rate1m{{le="+Inf", {BOTH}}})'
    return (*found, Query(f"{total_time} / {events}", "mean {{engine}}"))


def _engine_heat(name: str) -> tuple[Query, ...]:
    return (Query(f"sum by (le) (engine:{name}_bucket:rate1m{{{BOTH}}})", "{{le}}"),)


GENERATION = (
    Plot(
        "Generations by outcome",
        "reqps",
        "error: see the engine's log. cancelled: clients give up, so look at TTFT. refused: the guard or a limit said no; if "
        "these are honest users, loosen it.",
        (Query(rate(m.GENERATION_REQUESTS, by="outcome", where=MODEL), "{{outcome}}"),),
    ),
    Plot(
        "Time to first token",
        "s",
        "Seconds mean long prompts or a full queue: shorten the context, reuse the prefix, or lower the concurrency.",
        p50_p95(m.GENERATION_TTFT, "model", MODEL),
        limit=3,
    ),
    Plot(
        "Time between tokens",
        "s",
        "Above 0.1 s a reader waits for words. Rising with 'Places': too many at once for the machine's memory bandwidth, so "
        "lower slots.",
        p50_p95(m.GENERATION_ITL, "model", MODEL),
    ),
    Plot(
        "Generation duration",
        "s",
        "Rising while tokens per second are flat means longer answers: lower max_tokens. Rising while they fall means that the "
        "engine is short of memory bandwidth.",
        p50_p95(m.GENERATION_DURATION, "model", MODEL),
    ),
    Plot(
        "Why replies end",
        "reqps",
        "length: max_tokens cuts them, so raise it or ask for less. none: they broke off. Only stop is what a reader wants.",
        (Query(rate(m.GENERATION_FINISHED, by="reason", where=MODEL), "{{reason}}"),),
    ),
    Plot(
        "Tokens per prompt and reply",
        "suffix: tokens",
        "Prompts near context_tokens are refused soon. Replies at max_tokens: the model does not stop, see `llmlab runs show`.",
        (
            Query(quantile(0.95, m.GENERATION_PROMPT_SIZE, where=MODEL), "p95 prompt"),
            Query(quantile(0.95, m.GENERATION_REPLY_SIZE, where=MODEL), "p95 reply"),
        ),
    ),
    Plot(
        "Places",
        "short",
        "Waiting above zero for long: more arrives than the engine can do, so add a replica or slots. Running above zero while "
        "nobody asks: a place has leaked.",
        (Query(total(m.ADMISSION_RUNNING), "running"), Query(total(m.ADMISSION_WAITING), "waiting")),
    ),
    Plot(
        "Wait for a place",
        "s",
        "p95 near wait_seconds means that the queue is full most of the time: users wait as long as they are made to.",
        p50_p95(m.ADMISSION_WAIT),
    ),
    Plot(
        "Refused with 429",
        "reqps",
        "queue, queued_tokens, wait, connections: the engine is too small for the load. key_requests, key_tokens: one key is "
        "over its own limit, see `llmlab keys list`.",
        (Query(rate(m.ADMISSION_REFUSED, by="reason"), "{{reason}}"),),
        width=12,
    ),
    Plot(
        "Adapter changes in the last hour",
        "short",
        "Adapters added and removed over the API. A failed change left everything as it was; its answer says why.",
        (Query(increase(m.ADAPTER_CHANGES, "1h", by="change, outcome"), "{{change}}: {{outcome}}"),),
        kind="value",
        width=12,
    ),
)

# The twelve panels of vLLM's official dashboard, in its order; monitoring.rules makes the series, for vLLM from its own.
ENGINE_PANELS = (
    Plot(
        "E2E request latency",
        "s",
        "From the request to the last token. p99 far above p50: some requests wait or are very long, see queue time and lengths.",
        _engine_quantiles("e2e_request_latency_seconds"),
        width=8,
    ),
    Plot(
        "Token throughput",
        "suffix: tok/s",
        "Reply tokens falling while requests wait: the engine is starved of memory bandwidth, or the machine is shared.",
        (
            Query(_engine("engine:prompt_tokens:rate1m"), "prompt {{engine}}"),
            Query(_engine("engine:generation_tokens:rate1m"), "reply {{engine}}"),
        ),
        width=8,
    ),
    Plot(
        "Inter-token latency",
        "s",
        "What a reader sees between two tokens. Jumps mean that long prompts are read between them: bound their length.",
        _engine_quantiles("inter_token_latency_seconds"),
        width=8,
    ),
    Plot(
        "Scheduler state",
        "short",
        "Requests that wait for long need more slots, a larger cache, or another engine.",
        (
            Query(_engine("engine:num_requests_running"), "running {{engine}}"),
            Query(_engine("engine:num_requests_waiting"), "waiting {{engine}}"),
        ),
        width=8,
    ),
    Plot(
        "Time to first token of the engine",
        "s",
        "Prefill and the wait before it. Rising with the prompt length: prefill is the cost. Rising without: the queue is.",
        _engine_quantiles("time_to_first_token_seconds"),
        width=8,
    ),
    Plot(
        "KV cache in use",
        "percentunit",
        "Near 100 % vLLM interrupts requests and computes them again: lower context_tokens or slots. llama.cpp keeps a whole "
        "context for each slot, so it shows the share of slots in use.",
        (Query(f"max by (engine) (engine:kv_cache_usage:ratio{{{ENGINE}}})", "{{engine}}"),),
        width=8,
    ),
    Plot(
        "Prompt length",
        "short",
        "How many prompts of which length, in tokens. Long ones hold everybody up: bound max_prompt_chars or k.",
        _engine_heat("request_prompt_tokens"),
        kind="heat",
        width=8,
    ),
    Plot(
        "Reply length",
        "short",
        "How many replies of which length, in tokens. All at max_tokens: the model does not stop.",
        _engine_heat("request_generation_tokens"),
        kind="heat",
        width=8,
    ),
    Plot(
        "Finish reason",
        "reqps",
        "abort or none: clients leave, so look at the time to the first token. length: max_tokens cuts them.",
        (Query(f"sum by (engine, reason) (engine:request_success:rate1m{{{BOTH}}})", "{{reason}} {{engine}}"),),
        width=8,
    ),
    Plot(
        "Queue time",
        "s",
        "Seconds waited per second, of all requests together. Above the number of requests that run: more wait than work.",
        (Query(_engine("engine:request_queue_time_seconds:rate1m"), "{{engine}}"),),
        width=8,
    ),
    Plot(
        "Prefill and decode time",
        "s",
        "Seconds spent per second. Prefill above decode: the context is the cost, so shorten it or let prompts begin alike.",
        (
            Query(_engine("engine:request_prefill_time_seconds:rate1m"), "prefill {{engine}}"),
            Query(_engine("engine:request_decode_time_seconds:rate1m"), "decode {{engine}}"),
        ),
        width=8,
    ),
    Plot(
        "Longest reply of a group",
        "suffix: tok/s",
        "Tokens of the longest of several replies to one prompt (`n`), per second. Here each reply is a request of its own.",
        (Query(_engine("engine:request_max_num_generation_tokens:rate1m"), "{{engine}}"),),
        width=8,
    ),
)

ENGINE_LIFE = (
    Plot(
        "Engine restarts in the last hour",
        "short",
        "Anything above zero is a crash, most often out of memory: lower the context length or the number of slots.",
        (Query(increase(m.ENGINE_RESTARTS, "1h", by="engine", where=ENGINE), "{{engine}}"),),
        kind="value",
        width=8,
    ),
    Plot(
        "Engine circuit open",
        "short",
        "One: the engine failed several times in a row and is tried again only after a pause. Its log says why, GET /readyz "
        "when.",
        (Query(f"{m.series_name(m.ENGINE_CIRCUIT_OPEN)}{{{ENGINE}}}", "{{engine}}"),),
        kind="value",
        width=8,
    ),
    Plot(
        "Engine slots",
        "short",
        "Sequences generated at once. Fewer than the requests that run together on most days: raise slots where memory allows.",
        (Query(f"{m.series_name(m.ENGINE_SLOTS)}{{{ENGINE}}}", "{{engine}}"),),
        kind="value",
        width=8,
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
        p50_p95(m.GUARD_DURATION, "stage"),
        width=12,
    ),
)

BOARD = Board(
    "serving",
    "serving",
    "Generations, the queue before the engine, the engine itself in the terms of vLLM's dashboard, and the guards.",
    {
        "Generations": GENERATION,
        "Engine, as vLLM's dashboard shows it": ENGINE_PANELS,
        "Engine's life": ENGINE_LIFE,
        "Guards": GUARDS,
    },
    (
        Variable("model", "Model", m.series_name(m.GENERATION_REQUESTS)),
        Variable("engine", "Engine", m.series_name(m.ENGINE_INFO)),
    ),
)
