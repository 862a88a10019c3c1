"""RAG quality: what is found, what is answered from it, whether the sources hold it, and how old the index is."""

from __future__ import annotations

from monitoring import metrics as m
from monitoring.dashboards.plots import WINDOW, Board, Plot, Query, Variable, mean, p50_p95, quantile, rate, share

STAGE = 'stage=~"$stage"'
HITS = m.series_name(m.RAG_HITS)

ANSWERS = (
    Plot(
        "RAG questions by outcome",
        "reqps",
        "Many abstained: the index does not hold the answers, or the score threshold is too high. Errors: look at the stage that "
        "stopped in 'RAG stage latency'.",
        (Query(rate(m.RAG_REQUESTS, by="outcome"), "{{outcome}}"),),
    ),
    Plot(
        "Abstained",
        "percentunit",
        "A rise after a new index or embedder means that it finds less: evaluate retrieval, then serve the generation before.",
        (Query(share(m.RAG_REQUESTS, 'outcome="abstained"', 'outcome=~"answered|abstained"'), "abstained"),),
    ),
    Plot(
        "Time to the whole answer",
        "s",
        "The objective is 10 s. Look at 'RAG stage latency' for the stage that takes it: usually prompt, so fewer or shorter "
        "passages.",
        p50_p95(m.RAG_DURATION),
        limit=10,
    ),
    Plot(
        "RAG stage latency",
        "s",
        "Generate should dominate. A slow embed means that the CPU is oversubscribed; a slow search means that the index has "
        "outgrown a flat scan.",
        p50_p95(m.RAG_STAGE_DURATION, "stage", STAGE),
    ),
)

SOURCES = (
    Plot(
        "Sentences that no source holds",
        "percentunit",
        "Share of the checked sentences whose cited passages do not hold them. Above 10 % the objective is missed: tune the "
        "reader, or take fewer passages.",
        (Query(share(m.RAG_SENTENCES, 'supported="no"', 'supported=~"yes|no"'), "not supported"),),
        limit=0.1,
        width=8,
    ),
    Plot(
        "Sentences by support",
        "suffix: sentences/s",
        "unchecked ones say nothing that could be checked. Mostly unchecked: the model does not cite, so tune the reader.",
        (Query(rate(m.RAG_SENTENCES, by="supported"), "{{supported}}"),),
        width=8,
    ),
    Plot(
        "Invalid citation ratio",
        "percentunit",
        "Share of citations that name a chunk the model was not given. Above a few percent the model invents sources: tune the "
        "reader or tighten the prompt.",
        (Query(share(m.RAG_CITATIONS, 'valid="no"'), "invalid"),),
        width=8,
    ),
)

RETRIEVAL = (
    Plot(
        "Score of the best chunk",
        "none",
        "A fall after a new index or embedder means that questions and chunks no longer match: evaluate retrieval before "
        "serving that index.",
        (Query(quantile(0.5, m.RAG_TOP_SCORE), "p50"), Query(quantile(0.1, m.RAG_TOP_SCORE), "p10")),
    ),
    Plot(
        "Chunks per question",
        "short",
        "Near zero: the filter or the threshold removes everything. At the configured top-k always: the threshold does nothing, "
        "and each chunk costs prefill time.",
        (Query(mean(m.RAG_HITS), "mean"), Query(quantile(0.5, m.RAG_HITS), "p50")),
    ),
    Plot(
        "Questions that found nothing",
        "percentunit",
        "Share of searches with no chunk at all: the filter `where` excludes everything, or the index is empty.",
        (
            Query(
                f'sum(rate({HITS}_bucket{{le="0.0"}}[{WINDOW}])) / sum(rate({HITS}_count[{WINDOW}]))',
                "empty",
            ),
        ),
    ),
    Plot(
        "Prompt tokens per question",
        "suffix: tokens",
        "A CPU reads some hundred tokens a second: at 1,000 the first token takes seconds. Lower context_max_tokens or k.",
        p50_p95(m.RAG_CONTEXT),
    ),
)

INDEX = (
    Plot(
        "Index chunks",
        "short",
        "Zero means that no index is loaded: build one with `make index`. A sudden drop means that sources went missing.",
        (Query(f"max({m.series_name(m.INDEX_CHUNKS)})", "chunks"),),
        kind="value",
    ),
    Plot(
        "Index age",
        "s",
        "Older than the documents change means stale answers: run `make index` again. No value: no index is loaded.",
        (Query(f"time() - max({m.series_name(m.INDEX_CREATED)} > 0)", "age"),),
        kind="value",
    ),
    Plot(
        "Index generation and embedder",
        "none",
        "Another embedder than the documents were measured with gives other scores: evaluate retrieval. No value: no index is "
        "loaded.",
        (Query(m.series_name(m.INDEX_INFO), "{{index}}: {{generation}}, {{embedder}}"),),
        kind="name",
    ),
    Plot(
        "Documents by state",
        "short",
        "pending or deleting for minutes: the index is older than its documents, see GET /v1/documents. skipped: files that "
        "cannot be read.",
        (Query(f"sum by (state) ({m.series_name(m.INDEX_DOCUMENTS)})", "{{state}}"),),
    ),
)

BOARD = Board(
    "rag",
    "RAG quality",
    "Answers from documents: outcomes, whether their sources hold them, what retrieval finds, and the index.",
    {"Answers": ANSWERS, "Sources": SOURCES, "Retrieval": RETRIEVAL, "Index": INDEX},
    (Variable("stage", "Stage", f"{m.series_name(m.RAG_STAGE_DURATION)}_count"),),
)
