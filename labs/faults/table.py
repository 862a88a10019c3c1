"""The faults: what each is, where it shows, and the hints that lead there. One more is a row here and a function in
labs.faults.planting.

A sign is read from the same panel that a learner sees; tests/labs/test_faults.py holds every sign to be absent in a healthy
stack and present in the faulty one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from labs.faults import planting
from labs.faults.sandbox import MODEL, Sandbox
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.plots import Board, Plot
from monitoring.queries import now
from pipelines.config import unknown

WINDOW = "30s"  # of rates, in a sandbox that is scraped every second
Shown = Mapping[str, float]


@dataclass(frozen=True)
class Sign:
    """Where a fault shows.

    Attributes:
        board: name of the dashboard.
        panel: title on it.
        seen: tells from the panel's newest values, by legend, whether the fault shows.
        says: the same in words.
        alert: that fires after some time; or None.
        model: chosen at the top of the board; all of them if there is no need to choose.
    """

    board: str
    panel: str
    seen: Callable[[Shown], bool]
    says: str
    alert: str | None = None
    model: str = ".*"

    def shown(self, prometheus_url: str) -> dict[str, float]:
        """Return what the panel shows now; `NoAnswer` if Prometheus does not say."""
        board, plot = self._plot()
        found: dict[str, float] = {}
        for query in plot.queries:
            for series in now(prometheus_url, board.filled(query.expr.replace("$model", self.model), WINDOW)):
                found[query.name(series.labels)] = series.points[-1][1]
        return found

    def _plot(self) -> tuple[Board, Plot]:
        board = next(board for board in BOARDS if board.name == self.board)
        return board, next(plot for plot in board.plots if plot.title == self.panel)


@dataclass(frozen=True)
class Fault:
    """One way in which a stack breaks.

    Attributes:
        name: also the diagnosis.
        what: happened, in one sentence.
        plant: puts it into a sandbox for the length of a block.
        sign: where it shows.
        hints: from vague to plain.
        remedy: what to do about it outside of the lab.
    """

    name: str
    what: str
    plant: Callable[[Sandbox], AbstractContextManager[None]]
    sign: Sign
    hints: tuple[str, str, str]
    remedy: str


FAULTS = (
    Fault(
        "wrong-chat-template",
        "The weights come with another chat template than the one that the model was tuned in.",
        planting.wrong_template,
        Sign("serving", "Why replies end", lambda s: s.get("length", 0) > 2 * s.get("stop", 0),
             "length is far above stop, for the base model too"),
        ("Users say that answers ramble.",
         "Does the model end its turns? The board serving knows why replies end, and how many tokens a prompt has.",
         "The base model has it too, and no adapter is served. Ask the engine how it renders a chat: POST /apply-template."),
        "Serve the file that the template lock was made with: `llmlab runs show` has its hash, and a tuned run refuses others.",
    ),
    Fault(
        "end-of-turn-never-supervised",
        "The adapter was tuned on rows in which replies were joined without an end between them, so it goes on until max_tokens.",
        planting.unsupervised_end,
        Sign("serving", "Why replies end", lambda s: s.get("length", 0) > 2 * s.get("stop", 0),
             "length is far above stop for the adapter, and not for the base", model=f"{MODEL}-tuned"),
        ("Users say that answers ramble.",
         "Compare the models: choose one after the other at the top of the board serving.",
         "Only the adapter does not stop. What was it tuned on? GET /v1/models shows its run, the run's proof card its stops."),
        "Tune on chats, whose every turn is learnt to its end; `llmlab data report FILE` tells of replies that lose theirs.",
    ),
    Fault(
        "stale-index",
        "Documents were uploaded, and no sync can begin, since something holds the index.",
        planting.stale_index,
        Sign("rag", "Documents by state", lambda s: s.get("pending", 0) >= 1, "pending stays above zero", "LlmlabIndexStale"),
        ("Users say that the new documents are never cited.",
         "Nothing fails. Is what is served what was uploaded? Look at the lowest row of the board rag.",
         "Documents are pending. GET /v1/documents says why the sync does not get on."),
        "End what holds the index, and the sync goes on by itself; `llmlab index sync` says who is in the way.",
    ),
    Fault(
        "wrong-embedder",
        "The index was built anew with another embedder than the one that the gateway is configured for.",
        planting.wrong_embedder,
        Sign("rag", "Index chunks", lambda s: s.get("chunks") == 0, "no chunk is served", "LlmlabAvailabilityBurn"),
        ("Users say that chats work and questions to the documents do not.",
         "Which route answers with errors? Then look at the lowest row of the board rag.",
         "No index is served, though there is one. GET /readyz says why it cannot be opened."),
        "Build it with the configured embedder (`make index`), or configure the other one in configs/rag/default.yaml.",
    ),
    Fault(
        "poisoned-document",
        "A document speaks to the model and tells it what to say.",
        planting.poisoned_document,
        Sign("serving", "Guard findings per second", lambda s: any("injection, chunk" in name and v > 0 for name, v in s.items()),
             "injection is found in chunks"),
        ("A user says that one of the sources looks strange.",
         "Which guard finds something, and at which stage? The lowest row of the board serving.",
         "Passages are held back. Ask a question: held_back in the answer of /v1/rag/query names the document."),
        "Remove the document (DELETE /v1/documents/PATH), and look who may upload: `llmlab keys list`.",
    ),
    Fault(
        "dead-engine",
        "Something kills the engine whenever it has started.",
        planting.dead_engine,
        Sign("overview", "Engine up", lambda s: bool(s) and max(s.values()) == 0, "no", "LlmlabEngineDown"),
        ("Users say that nothing works any more.",
         "The gateway answers. What is behind it? The board overview, first row.",
         "The engine does not stay up. GET /readyz and the gateway's log say how it ended."),
        "Find who kills it: most often the kernel, for memory (dmesg). Lower context_tokens or slots.",
    ),
    Fault(
        "unbounded-queue",
        "Nobody is refused, so that all wait, each longer than the one before.",
        planting.unbounded_queue,
        Sign("serving", "Places", lambda s: s.get("waiting", 0) > 2 * s.get("running", 0) > 0,
             "many more wait than run, and nobody is refused", "LlmlabQueueGrows"),
        ("Users say that it takes for ever.",
         "Is it the model that is slow, or the wait before it? The board serving has both.",
         "More wait than run, and 'Refused with 429' is empty. Which bounds does admission have?"),
        "Bound the queue: `admission.queued` and `wait_seconds` in configs/serve; who is refused at once can go elsewhere.",
    ),
    Fault(
        "renamed-metric",
        "The gateway exports a metric by another name than the dashboards and rules ask for.",
        planting.renamed_metric,
        Sign("serving", "Time to first token", lambda s: not s, "no data, while generations go on"),
        ("Users are content. The one on call is not.",
         "A panel without data is not a panel that is well. Which one has none, although something happens?",
         "Compare /metrics, as Prometheus stores it, with the expression of the empty panel."),
        "Generate dashboards and rules from the declared metrics (`llmlab dashboards`), and check that each returns data.",
    ),
)  # fmt: skip


def find(name: str) -> Fault:
    """Return a fault by its name; `UnknownName` with the valid ones if there is none."""
    found = next((fault for fault in FAULTS if fault.name == name), None)
    if found is None:
        raise unknown("fault", name[:80], [fault.name for fault in FAULTS])
    return found
