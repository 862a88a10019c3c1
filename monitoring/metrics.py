"""Every metric of the lab, declared once, on three registries: the gateway's, that of a training, and the machine's in both.

A leaf: it imports prometheus_client and nothing of ours. It does not decide when a metric changes (the gateway,
`labs.metered` and `monitoring.hardware` do) and does not draw anything (`monitoring.dashboards` does). See the live values with:

    curl -s http://127.0.0.1:8000/metrics    # of the gateway
    curl -s http://127.0.0.1:8090/metrics    # of a training

Units are base units (seconds, bytes, tokens, dollars). Labels are bounded: what a client can choose goes through
`bounded` first. Where a gateway has several processes (`monitoring.workers`), a gauge with the mode livesum is summed over them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

PREFIX = "llmlab_"
OTHER = "other"
PATHS = GATEWAY_PATH, ENGINE_PATH = "/metrics", "/metrics/engine"  # where Prometheus asks a gateway: of itself, and of its engine

GENERATION_OUTCOMES = ("ok", "error", "cancelled", "refused")
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "none")  # none: it broke off, or the client left
TOKEN_KINDS = ("prompt", "reply")
RAG_OUTCOMES = ("answered", "abstained", "error")
RAG_STAGES = ("embed", "search", "prompt", "generate")
ADMISSION_REASONS = ("queue", "queued_tokens", "wait", "key_requests", "key_tokens", "connections")
CITATION_VALIDITY = ("yes", "no")
SENTENCE_SUPPORT = ("yes", "no", "unchecked")  # unchecked: it says nothing that a passage could hold
DOCUMENT_STATES = ("indexed", "pending", "skipped", "deleting")
GUARDS = ("secrets", "personal", "injection", "repetition", "length")
GUARD_STAGES = ("input", "chunk", "output")
GUARD_ACTIONS = ("report", "redact", "block")
ADAPTER_CHANGE_KINDS, ADAPTER_CHANGE_OUTCOMES = ("add", "remove"), ("ok", "failed")
TRAINING_LABELS = ("model", "recipe", "rehearsal")  # names of the catalogue and of configs/recipes; yes or no

# A generation on a CPU takes minutes, a health check milliseconds: 5 ms to 5 min.
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# 82 ms was measured on a CPU with a short prompt; a 1,000-token prompt takes seconds.
_TTFT_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60)
# 10 ms is 100 tokens/s for one reader; a person reads about 10 tokens/s.
_ITL_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WAIT_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30)
_GENERATION_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
# A search takes about a millisecond, the generate stage as long as a generation.
_STAGE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Guards take fractions of a millisecond for a question, milliseconds for a long prompt.
_GUARD_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HITS = (0, 1, 2, 3, 4, 5, 8, 10, 15, 20, 50)
_SCORES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter and histogram that nobody reads

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

HTTP_REQUESTS = Counter(
    "llmlab_http_requests_total",
    "Requests answered by the gateway; route is the template, never the raw path.",
    ("route", "method", "status"),
    registry=REGISTRY,
)
HTTP_REQUEST_DURATION = Histogram(
    "llmlab_http_request_duration_seconds",
    "Time from the first byte in to the last byte out.",
    ("route",),
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)
HTTP_REQUESTS_IN_FLIGHT = Gauge(
    "llmlab_http_requests_in_flight",
    "Requests accepted and not yet answered.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
GATEWAY_TASKS = Gauge(
    "llmlab_gateway_tasks",
    "Tasks of the gateway's event loop; they come and go with requests.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)

GENERATION_REQUESTS = Counter(
    "llmlab_generation_requests_total",
    "Generations asked of the engine, by how they ended.",
    ("model", "outcome"),
    registry=REGISTRY,
)
GENERATION_TTFT = Histogram(
    "llmlab_generation_ttft_seconds",
    "Time to first token: from the request to the first generated token, as the gateway sees it.",
    ("model",),
    buckets=_TTFT_SECONDS,
    registry=REGISTRY,
)
GENERATION_DURATION = Histogram(
    "llmlab_generation_duration_seconds",
    "Time from the request to the last generated token.",
    ("model",),
    buckets=_GENERATION_SECONDS,
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter(
    "llmlab_prompt_tokens_total",
    "Prompt tokens, as the engine counts them; estimated for a stream that ended early.",
    ("model",),
    registry=REGISTRY,
)
GENERATED_TOKENS = Counter(
    "llmlab_generated_tokens_total",
    "Generated tokens, as the engine counts them.",
    ("model",),
    registry=REGISTRY,
)

GENERATION_ITL = Histogram(
    "llmlab_generation_inter_token_seconds",
    "Time between two pieces of a streamed reply, as the gateway sees it.",
    ("model",),
    buckets=_ITL_SECONDS,
    registry=REGISTRY,
)
GENERATION_FINISHED = Counter(
    "llmlab_generation_finished_total",
    "Replies by why they ended, as the engine says it.",
    ("model", "reason"),
    registry=REGISTRY,
)
GENERATION_PROMPT_SIZE = Histogram(
    "llmlab_generation_prompt_tokens", "Tokens of one prompt.", ("model",), buckets=_TOKENS, registry=REGISTRY
)
GENERATION_REPLY_SIZE = Histogram(
    "llmlab_generation_reply_tokens", "Tokens of one reply.", ("model",), buckets=_TOKENS, registry=REGISTRY
)
CACHED_TOKENS = Counter(
    "llmlab_prompt_tokens_cached_total",
    "Prompt tokens that the engine had in its cache already; part of llmlab_prompt_tokens_total.",
    ("model",),
    registry=REGISTRY,
)
COST = Counter(
    "llmlab_cost_dollars_total",
    "What the tokens cost at the prices of `prices` or of the catalogue; no series for a model without a price.",
    ("model", "kind"),
    registry=REGISTRY,
)

ADMISSION_RUNNING = Gauge(
    "llmlab_admission_running",
    "Generations that have a place at the engine.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
ADMISSION_WAITING = Gauge(
    "llmlab_admission_waiting",
    "Generations that wait in the gateway for a place.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
ADMISSION_WAIT = Histogram(
    "llmlab_admission_wait_seconds",
    "Time that a generation waited for its place; 0 for one that did not wait.",
    buckets=_WAIT_SECONDS,
    registry=REGISTRY,
)
ADMISSION_REFUSED = Counter(
    "llmlab_admission_refused_total",
    "Requests refused with 429, by what there was no room for.",
    ("reason",),
    registry=REGISTRY,
)

RAG_REQUESTS = Counter("llmlab_rag_requests_total", "Questions asked of the index, by outcome.", ("outcome",), registry=REGISTRY)
RAG_STAGE_DURATION = Histogram(
    "llmlab_rag_stage_duration_seconds",
    "Time spent in one stage of answering a question.",
    ("stage",),
    buckets=_STAGE_SECONDS,
    registry=REGISTRY,
)
RAG_HITS = Histogram("llmlab_rag_hits", "Chunks returned by the search for one question.", buckets=_HITS, registry=REGISTRY)
RAG_TOP_SCORE = Histogram(
    "llmlab_rag_top_score", "Best cosine of the chunks for one question.", buckets=_SCORES, registry=REGISTRY
)
RAG_CITATIONS = Counter(
    "llmlab_rag_citations_total",
    "Citations in answers; valid=yes when the cited chunk number is among those given to the model.",
    ("valid",),
    registry=REGISTRY,
)
RAG_DURATION = Histogram(
    "llmlab_rag_duration_seconds",
    "Time from a question to the end of its answer, the wait for a place included.",
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)
RAG_SENTENCES = Counter(
    "llmlab_rag_sentences_total",
    "Sentences of answers, by whether the passages that they cite hold them.",
    ("supported",),
    registry=REGISTRY,
)
RAG_CONTEXT = Histogram(
    "llmlab_rag_context_tokens",
    "Tokens of the prompt of one question: the passages, the question and the instructions.",
    buckets=_TOKENS,
    registry=REGISTRY,
)
GUARD_DECISIONS = Counter(
    "llmlab_guard_decisions_total",
    "Things that a guard found, by where it found them and what was done about them.",
    ("guard", "stage", "action"),
    registry=REGISTRY,
)
GUARD_DURATION = Histogram(
    "llmlab_guard_duration_seconds",
    "Time that all guards took for one question, its passages, or its reply.",
    ("stage",),
    buckets=_GUARD_SECONDS,
    registry=REGISTRY,
)
INDEX_CHUNKS = Gauge("llmlab_index_chunks", "Chunks in the index that is served.", registry=REGISTRY)
INDEX_CREATED = Gauge(
    "llmlab_index_created_timestamp_seconds",
    "Unix time at which the served index was finished; 0 while no index is loaded.",
    registry=REGISTRY,
)
INDEX_INFO = Gauge(
    "llmlab_index_info",
    "Always 1; the labels name the generation that is served and its embedder. Absent while no index is loaded.",
    ("index", "generation", "embedder"),
    registry=REGISTRY,
)
INDEX_DOCUMENTS = Gauge(
    "llmlab_index_documents",
    "Documents of the folder that /v1/documents changes, by what the index has of them.",
    ("state",),
    registry=REGISTRY,
)

ENGINE_UP = Gauge("llmlab_engine_up", "1 when the engine answers its health check, else 0.", ("engine",), registry=REGISTRY)
ENGINE_RESTARTS = Counter(
    "llmlab_engine_restarts_total",
    "Times the engine process was started again after it ended.",
    ("engine",),
    registry=REGISTRY,
)
ENGINE_CIRCUIT_OPEN = Gauge(
    "llmlab_engine_circuit_open",
    "1 while an engine that failed several times in a row is left alone for a while, else 0.",
    ("engine",),
    registry=REGISTRY,
)
ENGINE_SLOTS = Gauge("llmlab_engine_slots", "Sequences that the engine generates at once.", ("engine",), registry=REGISTRY)
ENGINE_INFO = Gauge(
    "llmlab_engine_info",
    "Always 1; the labels name the engine that was chosen and the reason.",
    ("engine", "reason"),
    registry=REGISTRY,
)
ENGINE_METRICS = (ENGINE_UP, ENGINE_RESTARTS, ENGINE_CIRCUIT_OPEN, ENGINE_SLOTS, ENGINE_INFO)
ADAPTER_CHANGES = Counter(
    "llmlab_adapter_changes_total",
    "Adapters added or removed over the API, by how that ended.",
    ("change", "outcome"),
    registry=REGISTRY,
)
BUILD_INFO = Gauge("llmlab_build_info", "Always 1; the label names the version of the lab.", ("version",), registry=REGISTRY)
MODEL_INFO = Gauge(
    "llmlab_model_info",
    "Always 1; the passport of a served model: its base, and the run that it comes from with the fingerprint of that run.",
    ("model", "base", "run", "fingerprint"),
    registry=REGISTRY,
)

HARDWARE = CollectorRegistry()  # in the answers of both others, by monitoring.hardware

MACHINE_MEMORY = Gauge("llmlab_machine_memory_bytes", "Memory of the machine.", registry=HARDWARE)
MACHINE_MEMORY_AVAILABLE = Gauge(
    "llmlab_machine_memory_available_bytes", "Memory that new work can have without swapping.", registry=HARDWARE
)
MACHINE_CPUS = Gauge("llmlab_machine_cpus", "CPU cores that this process may use.", registry=HARDWARE)
MACHINE_LOAD = Gauge("llmlab_machine_load", "Processes that run or wait for a core, mean of one minute.", registry=HARDWARE)
DISK_SIZE = Gauge("llmlab_disk_size_bytes", "Size of the file system that holds a folder.", ("folder",), registry=HARDWARE)
DISK_FREE = Gauge("llmlab_disk_free_bytes", "Room that is left there for this user.", ("folder",), registry=HARDWARE)
GPU_BUSY = Gauge(
    "llmlab_gpu_busy_ratio", "Share of the last moments in which the GPU computed; absent without a GPU.", ("gpu",),
    registry=HARDWARE,
)  # fmt: skip
GPU_MEMORY = Gauge("llmlab_gpu_memory_bytes", "Memory of a GPU; absent without one.", ("gpu",), registry=HARDWARE)
GPU_MEMORY_USED = Gauge("llmlab_gpu_memory_used_bytes", "Memory in use; absent without a GPU.", ("gpu",), registry=HARDWARE)
GPU_POWER = Gauge("llmlab_gpu_power_watts", "Power that a GPU draws; absent without one.", ("gpu",), registry=HARDWARE)
GPU_TEMPERATURE = Gauge(
    "llmlab_gpu_temperature_celsius", "Temperature of a GPU; absent without one.", ("gpu",), registry=HARDWARE
)

TRAINING = CollectorRegistry()
ProcessCollector(registry=TRAINING)

TRAINING_LOSS = Gauge(
    "llmlab_training_loss",
    "Loss of the last optimiser step: nats per supervised token; for dpo nats per pair.",
    TRAINING_LABELS,
    registry=TRAINING,
)
TRAINING_FIRST_LOSS = Gauge(
    "llmlab_training_first_loss",
    "Loss of the first optimiser step since the training began or was resumed.",
    TRAINING_LABELS,
    registry=TRAINING,
)
TRAINING_LEARNING_RATE = Gauge(
    "llmlab_training_learning_rate", "Learning rate of the last optimiser step.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_GRADIENT_NORM = Gauge(
    "llmlab_training_gradient_norm",
    "Norm of the gradient of the last optimiser step, before it is clipped.",
    TRAINING_LABELS,
    registry=TRAINING,
)
TRAINING_TOKENS_PER_SECOND = Gauge(
    "llmlab_training_tokens_per_second", "Tokens per second of the last optimiser step.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_STEP_DURATION = Gauge(
    "llmlab_training_step_duration_seconds", "Time that the last optimiser step took.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_ROWS = Counter(
    "llmlab_training_rows_total", "Rows learnt since the training began or was resumed.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_STEPS_DONE = Gauge(
    "llmlab_training_steps_done",
    "Optimiser steps that are finished, those before an interruption included.",
    TRAINING_LABELS,
    registry=TRAINING,
)
TRAINING_STEPS_PLANNED = Gauge(
    "llmlab_training_steps_planned", "Optimiser steps of the whole training.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_ETA = Gauge(
    "llmlab_training_eta_seconds", "Time that the steps left will take, at the mean pace.", TRAINING_LABELS, registry=TRAINING
)
TRAINING_PEAK_MEMORY = Gauge(
    "llmlab_training_peak_memory_bytes",
    "Largest memory of the training so far: of the GPU, or resident memory on a CPU.",
    TRAINING_LABELS,
    registry=TRAINING,
)
TRAINING_LAST_STEP = Gauge(
    "llmlab_training_last_step_timestamp_seconds",
    "Unix time at which the last optimiser step was finished.",
    TRAINING_LABELS,
    registry=TRAINING,
)


def bounded(value: str, allowed: Collection[str]) -> str:
    """Return `value` when it is allowed as a label value, else "other".

    A name chosen by a client would otherwise create a new time series with every request.
    """
    return value if value in allowed else OTHER


def set_engine(engine: str, reason: str, slots: int) -> None:
    """Record which engine serves and why; an earlier choice is forgotten.

    Args:
        engine: name of the engine, such as "llamacpp".
        reason: why it was chosen, one of a fixed set of sentences (`pipelines.hardware.choose_engine`).
        slots: sequences that it generates at once.
    """
    ENGINE_SLOTS.clear()
    ENGINE_SLOTS.labels(engine=engine).set(slots)
    ENGINE_INFO.clear()
    ENGINE_INFO.labels(engine=engine, reason=reason).set(1)
    ENGINE_UP.clear()
    ENGINE_UP.labels(engine=engine).set(0)
    ENGINE_RESTARTS.labels(engine=engine)
    ENGINE_CIRCUIT_OPEN.clear()
    ENGINE_CIRCUIT_OPEN.labels(engine=engine).set(0)


def set_build(version: str) -> None:
    """Record the version of the lab that is running."""
    BUILD_INFO.clear()
    BUILD_INFO.labels(version=version).set(1)


def set_index(index: str, generation: str, embedder: str, chunks: int, created: float) -> None:
    """Record the index that is served; an empty `generation` says that none is.

    Args:
        index: its name.
        generation: of it.
        embedder: name of the embedder.
        chunks: how many it has.
        created: Unix time at which it was finished.
    """
    INDEX_INFO.clear()
    if generation:
        INDEX_INFO.labels(index=index, generation=generation, embedder=embedder).set(1)
    INDEX_CHUNKS.set(chunks if generation else 0)
    INDEX_CREATED.set(created if generation else 0)


def set_models(passports: Mapping[str, tuple[str, str, str]]) -> None:
    """Record where each served model comes from: its base, run and fingerprint, empty for what was not tuned here."""
    if _SHOWN == passports:
        return  # in a worker process, every series that is made anew stays in memory
    _SHOWN.clear()
    _SHOWN.update(passports)
    MODEL_INFO.clear()
    for model, (base, run, fingerprint) in passports.items():
        MODEL_INFO.labels(model=model, base=base, run=run, fingerprint=fingerprint).set(1)


def start_series(models: Iterable[str]) -> None:
    """Create the series of these models (and "other") at zero.

    `rate` needs a zero before the first event; without it the first error of a model would not be seen.
    """
    for model in (*models, OTHER):
        for outcome in GENERATION_OUTCOMES:
            GENERATION_REQUESTS.labels(model=model, outcome=outcome)
        for reason in FINISH_REASONS:
            GENERATION_FINISHED.labels(model=model, reason=reason)
        for metric in (
            GENERATION_TTFT, GENERATION_ITL, GENERATION_DURATION, GENERATION_PROMPT_SIZE, GENERATION_REPLY_SIZE, PROMPT_TOKENS,
            GENERATED_TOKENS, CACHED_TOKENS,
        ):  # fmt: skip
            metric.labels(model=model)


def start_training() -> None:
    """Forget an earlier training of this process; its last figures would pass for those of the next."""
    for metric in (
        TRAINING_LOSS, TRAINING_FIRST_LOSS, TRAINING_LEARNING_RATE, TRAINING_GRADIENT_NORM, TRAINING_TOKENS_PER_SECOND,
        TRAINING_STEP_DURATION, TRAINING_ROWS, TRAINING_STEPS_DONE, TRAINING_STEPS_PLANNED, TRAINING_ETA, TRAINING_PEAK_MEMORY,
        TRAINING_LAST_STEP,
    ):  # fmt: skip
        metric.clear()


def series_name(metric: Counter | Gauge | Histogram) -> str:
    """Return the name under which Prometheus stores a metric; for a histogram the part before `_bucket`."""
    family = next(iter(metric.describe()))
    return f"{family.name}_total" if family.type == "counter" else family.name


def series_names() -> dict[str, frozenset[str]]:
    """Return the names of the series of each declared metric (`_bucket`, `_sum`, `_count`, `_total`)."""
    collected = (family for registry in (REGISTRY, TRAINING, HARDWARE) for family in registry.collect())
    families = (family for family in collected if family.name.startswith(PREFIX))
    return {family.name: frozenset(family.name + end for end in _ENDINGS[family.type]) for family in families}


_SHOWN: dict[str, tuple[str, str, str]] = {}  # by set_models
_ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def _start_fixed_series() -> None:
    for outcome in RAG_OUTCOMES:
        RAG_REQUESTS.labels(outcome=outcome)
    for reason in ADMISSION_REASONS:
        ADMISSION_REFUSED.labels(reason=reason)
    for stage in RAG_STAGES:
        RAG_STAGE_DURATION.labels(stage=stage)
    for valid in CITATION_VALIDITY:
        RAG_CITATIONS.labels(valid=valid)
    for supported in SENTENCE_SUPPORT:
        RAG_SENTENCES.labels(supported=supported)
    for state in DOCUMENT_STATES:
        INDEX_DOCUMENTS.labels(state=state)
    for stage in GUARD_STAGES:
        GUARD_DURATION.labels(stage=stage)
        for guard in GUARDS:
            for action in GUARD_ACTIONS:
                GUARD_DECISIONS.labels(guard=guard, stage=stage, action=action)
    for change in ADAPTER_CHANGE_KINDS:
        for outcome in ADAPTER_CHANGE_OUTCOMES:
            ADAPTER_CHANGES.labels(change=change, outcome=outcome)


_start_fixed_series()
