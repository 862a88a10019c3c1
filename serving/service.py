"""What the gateway serves: one model, its adapters, the engine that answers, and the index; made by `serving.launch`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.runs import Run
from serving.access import Access
from serving.adapters import Adapters
from serving.admission import Admission
from serving.crew import Crew
from serving.documents import Documents
from serving.drain import Drain
from serving.guard.gate import Gate
from serving.knowledge import Knowledge
from serving.problems import ManyWorkers
from serving.settings import ServeConfig
from serving.supervisor import Supervisor
from serving.upstream import Upstream


@dataclass(frozen=True)
class Service:
    """Everything that an endpoint needs.

    Attributes:
        config: limits and sizes.
        upstream: the way to the engine; its launch has the names of base and adapters.
        adapters: changes them.
        knowledge: the index.
        documents: what is added to it over the API.
        run: where the model in place of the base comes from; or None.
        base: what the base is: title, hub id, revision, file.
        access: who may ask.
        admission: the places at the engine.
        drain: whether the gateway is being stopped.
        crew: the workers that this process is one of; None if it is the whole gateway.
    """

    config: ServeConfig
    upstream: Upstream
    adapters: Adapters
    knowledge: Knowledge
    documents: Documents
    run: Run | None
    base: dict[str, Any]
    access: Access
    admission: Admission
    drain: Drain
    crew: Crew | None = None

    @cached_property
    def guard(self) -> Gate:
        """Return the guards, as configured."""
        return Gate(self.config.guard)

    @property
    def supervisor(self) -> Supervisor:
        """Return who keeps the engine running that answers now."""
        return self.upstream.supervisor

    @property
    def names(self) -> tuple[str, ...]:
        """Return the valid values of `model`, base first."""
        return self.upstream.launch.names

    @property
    def preferred(self) -> str:
        """Return the model for a question that names none."""
        return self.upstream.launch.preferred

    @property
    def slots(self) -> int:
        """Return how many sequences the engine generates at once."""
        return self.upstream.launch.slots

    def check_alone(self) -> None:
        """Raise `ManyWorkers` if this process is one of several, which would not know of a change in it."""
        if self.crew:
            came = f"{self.crew.size} workers serve here, and a change in one would not reach the others"
            raise ManyWorkers(came, "a server of one worker", "llmlab serve --set workers=1; llmlab index sync for documents")

    def run_of(self, name: str) -> Run | None:
        """Return the run that a served model comes from, None for the base; `UnknownName` if it is not served."""
        adapter = self.upstream.launch.adapter(name)
        return adapter.run if adapter else self.run

    def shown_passports(self) -> dict[str, tuple[str, str, str]]:
        """Return of each served model its base, run and fingerprint, in the words of the metrics."""
        base = f"{self.base['hub']}@{self.base['revision'][:12]}" if "hub" in self.base else str(self.base["title"])
        runs = {name: self.run_of(name) for name in self.names}
        return {name: (base, run.id if run else "", run.fingerprint if run else "") for name, run in runs.items()}

    def passport(self, name: str) -> dict[str, Any]:
        """Return where a served model comes from: the base, and for what was tuned its run and that run's inputs."""
        run = self.run_of(name)
        if run is None:
            return {"base": self.base}
        return {
            "base": self.base, "run": run.id, "kind": run.kind, "created": run.created, "fingerprint": run.fingerprint,
            "rehearsal": run.rehearsal, "inputs": list(run.inputs), "facts": run.facts,
        }  # fmt: skip
