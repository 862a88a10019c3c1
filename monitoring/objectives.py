"""What the service promises, and the alerts for when it uses up its error budget too fast.

Each objective counts bad events among all. The alerts follow the multi-window form of Google's SRE workbook (chapter 5, alerting
on SLOs): a long window shows that it matters, a short one that it goes on. The budget is that of a week: at 8.4 times the allowed
share 5 % of it is gone in an hour, at 2.8 times 10 % in six hours. Below a number of events nobody is woken. `monitoring.rules`
writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Histogram

from monitoring import metrics as m

WINDOWS = ("5m", "30m", "1h", "6h")
LEAST_EVENTS = 20  # in the long window
TTFT_SECONDS, RAG_SECONDS = 3.0, 10.0  # both are bounds of buckets


@dataclass(frozen=True)
class Burn:
    """One pair of windows: an alert fires while the bad share is over `factor` times the budget in both."""

    severity: str
    factor: float
    long: str
    short: str


BURNS = (Burn("critical", 8.4, "1h", "5m"), Burn("warning", 2.8, "6h", "30m"))


@dataclass(frozen=True)
class Objective:
    """A promise.

    Attributes:
        name: the value of the label `objective`.
        alert: the name of its alert, and of its page in monitoring/runbooks.
        target: share of good events, 0 to 1.
        bad: PromQL for the bad events within `{w}`.
        events: PromQL for all events within `{w}`.
        promise: what is promised, for the alert's text.
        look: what to look at first.
    """

    name: str
    alert: str
    target: float
    bad: str
    events: str
    promise: str
    look: str

    @property
    def budget(self) -> float:
        """Return the share of bad events that is allowed."""
        return round(1 - self.target, 6)


def _slower(histogram: Histogram, seconds: float) -> tuple[str, str]:
    """Return the PromQL for the observations above a bound of a bucket, and for all."""
    name = m.series_name(histogram)
    events = f"sum(increase({name}_count[{{w}}]))"
    return f'{events} - sum(increase({name}_bucket{{{{le="{seconds}"}}}}[{{w}}]))', events


_HTTP, _SENTENCES = m.series_name(m.HTTP_REQUESTS), m.series_name(m.RAG_SENTENCES)
_TTFT, _RAG = _slower(m.GENERATION_TTFT, TTFT_SECONDS), _slower(m.RAG_DURATION, RAG_SECONDS)

OBJECTIVES = (
    Objective(
        "availability",
        "LlmlabAvailabilityBurn",
        0.99,
        f'sum(increase({_HTTP}{{{{route=~"/v1/.+", status=~"5.."}}}}[{{w}}]))',
        f'sum(increase({_HTTP}{{{{route=~"/v1/.+"}}}}[{{w}}]))',
        "99 % of the requests below /v1 are answered without a 5xx status",
        'the panels "Engine up" and "Error ratio", then the gateway\'s log',
    ),
    Objective(
        "ttft",
        "LlmlabTtftBurn",
        0.95,
        *_TTFT,
        "95 % of the streams have their first token within 3 s",
        'the panels "Wait for a place" and "Tokens per prompt and reply" of the board serving',
    ),
    Objective(
        "rag_latency",
        "LlmlabRagLatencyBurn",
        0.95,
        *_RAG,
        "95 % of the questions to the documents are answered within 10 s",
        'the panel "RAG stage latency" of the board RAG quality for the stage that takes it',
    ),
    Objective(
        "citation_support",
        "LlmlabCitationSupportBurn",
        0.9,
        f'sum(increase({_SENTENCES}{{{{supported="no"}}}}[{{w}}]))',
        f'sum(increase({_SENTENCES}{{{{supported=~"yes|no"}}}}[{{w}}]))',
        "90 % of the sentences that can be checked are held by the passages that they cite",
        'the panels "Sentences by support" and "Score of the best chunk" of the board RAG quality',
    ),
)
