"""The board to look at first: is it healthy, do the objectives hold, and what does it cost?"""

from __future__ import annotations

from monitoring import metrics as m
from monitoring.dashboards.plots import Board, Plot, Query, increase, p50_p95, quantile, rate, share, total

HEALTH = (
    Plot(
        "Engine up",
        "bool_yes_no",
        "No means that the engine does not answer its health check: read its log, then start again with `make serve`.",
        (Query(f"min by (engine) ({m.series_name(m.ENGINE_UP)})", "{{engine}}"),),
        kind="value",
        width=4,
    ),
    Plot(
        "Gateway up",
        "bool_yes_no",
        "No means that Prometheus cannot reach the gateway: start it with `make serve`, or compare its port with prometheus.yml.",
        (Query('min by (instance) (up{job="llmlab-gateway"})', "{{instance}}"),),
        kind="value",
        width=4,
    ),
    Plot(
        "Alerts that fire",
        "short",
        "Anything above zero needs somebody: the alert's name is its page in monitoring/runbooks.",
        (Query('count by (alertname) (ALERTS{alertstate="firing"}) or on () vector(0)', "{{alertname}}"),),
        kind="value",
        width=4,
    ),
    Plot(
        "Engine and why",
        "none",
        "The engine that was chosen at the start, and the reason. If it is not the expected one, the reason says what to "
        "install.",
        (Query(m.series_name(m.ENGINE_INFO), "{{engine}}: {{reason}}"),),
        kind="name",
        width=4,
    ),
    Plot(
        "Models served",
        "none",
        "Model, base, run and fingerprint, as `llmlab runs show` knows them. Not the run that was promoted: start again with it.",
        (Query(m.series_name(m.MODEL_INFO), "{{model}}: {{base}} {{run}} {{fingerprint}}"),),
        kind="name",
        width=4,
    ),
    Plot(
        "Version",
        "none",
        "More than one version at a time means that an old gateway still runs: stop it.",
        (Query(f"count by (version) ({m.series_name(m.BUILD_INFO)})", "{{version}}"),),
        kind="name",
        width=4,
    ),
)

OBJECTIVES = (
    Plot(
        "How fast the error budget goes",
        "short",
        "Bad events of the last hour against what the objective allows: 1 uses up the budget just in time, above 8.4 somebody is "
        "woken. No line: too little traffic. The objective's page in monitoring/runbooks says what to look at.",
        (Query("llmlab:objective_bad:ratio1h / on (objective) group_left () llmlab:objective_budget:ratio", "{{objective}}"),),
        width=8,
        limit=8.4,
    ),
    Plot(
        "Bad events in five minutes",
        "percentunit",
        "Share of requests, first tokens, answers and sentences that miss their objective now. It falls as soon as the cause is "
        "gone.",
        (Query("llmlab:objective_bad:ratio5m", "{{objective}}"),),
        width=8,
    ),
    Plot(
        "Events of the objectives in an hour",
        "short",
        "Below 20 no objective raises an alert, since a single bad event would be a large share.",
        (Query("llmlab:objective_events:increase1h", "{{objective}}"),),
        width=8,
        limit=20,
    ),
)

TRAFFIC = (
    Plot(
        "Requests per second by route",
        "reqps",
        "Zero under load means that nothing reaches the gateway: check `make serve` and the client's address.",
        (Query(rate(m.HTTP_REQUESTS, by="route"), "{{route}}"),),
        width=8,
    ),
    Plot(
        "Error ratio",
        "percentunit",
        "Share of requests answered with a 5xx status. Above 1 % users notice: look at 'Engine up' first, then at the gateway's "
        "log.",
        (Query(share(m.HTTP_REQUESTS, 'status=~"5.."'), "5xx"),),
        width=8,
        limit=0.01,
    ),
    Plot(
        "Request latency by route",
        "s",
        "p95 far above p50 means queueing: compare with 'Requests in flight', then lower the concurrency limit or add an engine.",
        p50_p95(m.HTTP_REQUEST_DURATION, "route"),
        width=8,
    ),
    Plot(
        "First token and whole answer, p95",
        "s",
        "The first token's objective is 3 s, an answer's 10 s. Seconds mean long prompts or a full queue: see the board Serving.",
        (
            Query(quantile(0.95, m.GENERATION_TTFT), "first token"),
            Query(quantile(0.95, m.RAG_DURATION), "answer from documents"),
        ),
        width=12,
    ),
    Plot(
        "Requests in flight",
        "short",
        "A value that only rises means that requests arrive faster than they finish: clients should back off, or the limit is "
        "too high.",
        (
            Query(total(m.HTTP_REQUESTS_IN_FLIGHT), "in flight"),
            Query(total(m.GATEWAY_TASKS), "tasks of the gateway"),
        ),
        width=12,
    ),
)

COST = (
    Plot(
        "Dollars in an hour",
        "currencyUSD",
        "At the prices of the catalogue or of `prices` in configs/serve. No value: the model has no price. Prompt far above "
        "reply: cut the context.",
        (Query(increase(m.COST, "1h", by="model, kind"), "{{model}}, {{kind}}"),),
        width=8,
    ),
    Plot(
        "Tokens per second by model",
        "suffix: tok/s",
        "What is paid for. Reply tokens falling at constant traffic: the machine is shared or throttled.",
        (
            Query(rate(m.GENERATED_TOKENS, by="model"), "reply {{model}}"),
            Query(rate(m.PROMPT_TOKENS, by="model"), "prompt {{model}}"),
        ),
        width=8,
    ),
    Plot(
        "Share of prompt tokens from the engine's cache",
        "percentunit",
        "Cached tokens cost no arithmetic. Near zero where many prompts begin alike: something that changes stands at their "
        "beginning.",
        (Query(f"{rate(m.CACHED_TOKENS)} / {rate(m.PROMPT_TOKENS)}", "cached"),),
        width=8,
    ),
)

BOARD = Board(
    "overview",
    "overview",
    "Is it healthy, do the objectives hold, and what does it cost?",
    {"Is it healthy?": HEALTH, "Objectives": OBJECTIVES, "Traffic": TRAFFIC, "What does it cost?": COST},
)
