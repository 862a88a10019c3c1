"""The generated rules of Prometheus: engines under common names, and objectives with their burn-rate alerts.

Engines: the series `engine:*` are what the twelve panels of vLLM's own dashboard plot. For vLLM they come from its series, under
the names of today or those of older versions. llama.cpp counts tokens, requests and seconds only; the rest is what the gateway
sees of it, and likewise for remote models. The other alerts are in prometheus/alerts.yml. Written by: llmlab dashboards
"""

from __future__ import annotations

from typing import Any

import yaml

from monitoring import metrics as m
from monitoring.objectives import BURNS, LEAST_EVENTS, OBJECTIVES, WINDOWS, Burn, Objective

RUNBOOKS = "monitoring/runbooks/"
HEAD = "# Written by `llmlab dashboards` from monitoring/{source}. Do not edit.\n"
RATE = "1m"  # a fixed window: twelve scrapes
OBJECTIVES_INTERVAL = "1m"  # they look at hours

# What the gateway knows, with the label `engine` of the engine behind it, for engines that do not say it themselves.
_NOT_VLLM = f'* on (instance) group_left (engine) {m.series_name(m.ENGINE_INFO)}{{engine!="vllm"}}'


def rendered() -> dict[str, str]:
    """Return the text of each generated file by its name in monitoring/prometheus."""
    return {
        "engine.yml": _text("rules.py", "llmlab-engine", engine_rules()),
        "objectives.yml": _text("objectives.py", "llmlab-objectives", objective_rules(), OBJECTIVES_INTERVAL),
    }


def engine_rules() -> list[dict[str, Any]]:
    """Return the recording rules that give every engine the same names."""
    histograms = {
        "e2e_request_latency_seconds": ((), m.GENERATION_DURATION),
        "inter_token_latency_seconds": (("time_per_output_token_seconds",), m.GENERATION_ITL),
        "time_to_first_token_seconds": ((), m.GENERATION_TTFT),
        "request_prompt_tokens": ((), m.GENERATION_PROMPT_SIZE),
        "request_generation_tokens": ((), m.GENERATION_REPLY_SIZE),
    }
    rules = []
    for name, (older, ours) in histograms.items():
        means = {"_sum": "model"} if name.endswith("_seconds") else {}  # no mean of lengths is drawn
        for part, by in ({"_bucket": "le, model"} | means).items():
            rules += [
                _rule(f"engine:{name}{part}:rate1m", _vllm([f"{n}{part}" for n in (name, *older)], by), "vllm"),
                _rule(f"engine:{name}{part}:rate1m", _gateway(f"{m.series_name(ours)}{part}", f"{by}, engine")),
            ]
    return rules + _engine_counts() + _engine_times() + _engine_state()


def _engine_counts() -> list[dict[str, Any]]:
    reasons = _gateway(m.series_name(m.GENERATION_FINISHED), "model, reason, engine")
    ours = (("prompt_tokens", m.PROMPT_TOKENS), ("generation_tokens", m.GENERATED_TOKENS))
    theirs = {
        "prompt_tokens": "rate(llamacpp:prompt_tokens_total[1m]) + rate(llamacpp:prompt_tokens_cached_total[1m])",
        "generation_tokens": "rate(llamacpp:tokens_predicted_total[1m])",
    }
    rules = []
    for name, metric in ours:
        rules += [
            _rule(f"engine:{name}:rate1m", _vllm([f"{name}_total"], "model"), "vllm"),
            _rule(f"engine:{name}:rate1m", f"sum by (instance) ({theirs[name]})", "llamacpp"),
            _rule(f"engine:{name}:rate1m", _remote(f"rate({m.series_name(metric)}[{RATE}])", "model, engine")),
        ]
    finished = 'label_replace(rate(vllm:request_success_total[1m]), "reason", "$1", "finished_reason", "(.+)")'
    return [
        *rules,
        _rule("engine:request_success:rate1m", _renamed(finished, "model, reason"), "vllm"),
        _rule("engine:request_success:rate1m", reasons),
    ]


def _engine_times() -> list[dict[str, Any]]:
    reply = f"{m.series_name(m.GENERATION_REPLY_SIZE)}_sum"
    return [
        _rule("engine:request_queue_time_seconds:rate1m", _vllm(["request_queue_time_seconds_sum"], "model"), "vllm"),
        _rule("engine:request_queue_time_seconds:rate1m", _gateway(f"{m.series_name(m.ADMISSION_WAIT)}_sum", "engine")),
        _rule("engine:request_prefill_time_seconds:rate1m", _vllm(["request_prefill_time_seconds_sum"], "model"), "vllm"),
        _rule("engine:request_prefill_time_seconds:rate1m", "rate(llamacpp:prompt_seconds_total[1m])", "llamacpp"),
        _rule("engine:request_decode_time_seconds:rate1m", _vllm(["request_decode_time_seconds_sum"], "model"), "vllm"),
        _rule("engine:request_decode_time_seconds:rate1m", "rate(llamacpp:tokens_predicted_seconds_total[1m])", "llamacpp"),
        _rule(
            "engine:request_max_num_generation_tokens:rate1m",
            _vllm(["request_max_num_generation_tokens_sum"], "model"),
            "vllm",
        ),
        _rule("engine:request_max_num_generation_tokens:rate1m", _gateway(reply, "model, engine")),
    ]


def _engine_state() -> list[dict[str, Any]]:
    running, waiting = m.series_name(m.ADMISSION_RUNNING), m.series_name(m.ADMISSION_WAITING)
    slots = f'on (instance) {m.series_name(m.ENGINE_SLOTS)}{{engine="llamacpp"}}'
    usage = _renamed("vllm:kv_cache_usage_perc or vllm:gpu_cache_usage_perc", "model", "max")
    return [
        _rule("engine:num_requests_running", _renamed("vllm:num_requests_running", "model"), "vllm"),
        _rule("engine:num_requests_running", "sum by (instance) (llamacpp:requests_processing)", "llamacpp"),
        _rule("engine:num_requests_running", _remote(running, "engine")),
        _rule("engine:num_requests_waiting", _renamed("vllm:num_requests_waiting", "model"), "vllm"),
        _rule(
            "engine:num_requests_waiting",
            f"sum by (instance) (llamacpp:requests_deferred) + sum by (instance) ({waiting})",
            "llamacpp",
        ),
        _rule("engine:num_requests_waiting", _remote(waiting, "engine")),
        _rule("engine:kv_cache_usage:ratio", usage, "vllm"),
        _rule("engine:kv_cache_usage:ratio", f"sum by (instance) (llamacpp:requests_processing / {slots})", "llamacpp"),
    ]


def objective_rules() -> list[dict[str, Any]]:
    """Return what is recorded of each objective, and its alerts."""
    rules: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        label = {"objective": objective.name}
        for window in WINDOWS:
            bad, events = objective.bad.format(w=window), objective.events.format(w=window)
            expr = f"(({bad}) or vector(0)) / ({events} > 0)"
            rules.append({"record": f"llmlab:objective_bad:ratio{window}", "expr": expr, "labels": dict(label)})
        for burn in BURNS:
            record = f"llmlab:objective_events:increase{burn.long}"
            rules.append({"record": record, "expr": objective.events.format(w=burn.long), "labels": dict(label)})
        rules.append({"record": "llmlab:objective_budget:ratio", "expr": f"vector({objective.budget})", "labels": dict(label)})
    return rules + [_burn_alert(objective, burn) for objective in OBJECTIVES for burn in BURNS]


def _burn_alert(objective: Objective, burn: Burn) -> dict[str, Any]:
    of, limit = f'{{objective="{objective.name}"}}', round(burn.factor * objective.budget, 4)
    expr = (
        f"llmlab:objective_bad:ratio{burn.long}{of} > {limit} and llmlab:objective_bad:ratio{burn.short}{of} > {limit} "
        f"and llmlab:objective_events:increase{burn.long}{of} >= {LEAST_EVENTS}"
    )
    return {
        "alert": objective.alert,
        "expr": expr,
        "labels": {"severity": burn.severity},
        "annotations": {
            "summary": f"{{{{ $value | humanizePercentage }}}} of the last {burn.long} missed: {objective.promise}",
            "description": f"At this pace the budget of a week does not last. Look at {objective.look}.",
            "runbook_url": f"{RUNBOOKS}{objective.alert}.md",
        },
    }


def _vllm(names: list[str], by: str) -> str:
    """Return the rate of a series of vLLM, under the first of these names that it has."""
    return _renamed(" or ".join(f"rate(vllm:{name}[{RATE}])" for name in names), by)


def _renamed(expr: str, by: str, how: str = "sum") -> str:
    """Return series of vLLM with `model` in the place of its `model_name`."""
    return f'{how} by ({by}) (label_replace({expr}, "model", "$1", "model_name", "(.+)"))'


def _gateway(series: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}[{RATE}]) {_NOT_VLLM})"


def _remote(expr: str, by: str) -> str:
    only = f'* on (instance) group_left (engine) {m.series_name(m.ENGINE_INFO)}{{engine="provider"}}'
    return f"sum by ({by}) ({expr} {only})"


def _rule(record: str, expr: str, engine: str = "") -> dict[str, Any]:
    return {"record": record, "expr": expr} | ({"labels": {"engine": engine}} if engine else {})


def _text(source: str, name: str, rules: list[dict[str, Any]], interval: str = "") -> str:
    group = {"name": name} | ({"interval": interval} if interval else {}) | {"rules": rules}
    body = yaml.safe_dump({"groups": [group]}, sort_keys=False, width=1000, allow_unicode=True)
    return HEAD.format(source=source) + body
