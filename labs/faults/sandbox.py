"""A stack to break: gateway, engine, index and Prometheus in folders and on ports of their own, with users that keep coming.

All of it listens on loopback and lives in one temporary folder; no run, index, key or upload of the user's is read or written.
The gateway is `llmlab serve` in a process of its own, as it would be anywhere, so a fault is planted by what can go wrong there:
files, settings, signals. It plants none itself (`labs.faults.planting` does).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from labs.faults.traffic import Traffic
from monitoring import prometheus_server
from monitoring.child_server import ChildServer, ProgramFailed, ProgramMissing
from pipelines.config import ROOT, load, named
from pipelines.errors import ConfigError, EngineError
from pipelines.rag.index import RagConfig
from serving.address import check_free
from serving.supervisor import LEASH

if TYPE_CHECKING:
    import psutil

MODEL, INDEX = "smollm2-135m", "knowledge"
PAGES = ("falcon-40b", "phi-2", "qdrant", "prometheus", "lora", "kv-cache")  # of labs/knowledge: the questions are about them
HOST = "127.0.0.1"
CLIENTS = 2
SCRAPE_SECONDS = 1
READY_SECONDS = 120.0
GRACE_SECONDS = 5.0
SETTINGS = (
    "host=127.0.0.1", "engine=llamacpp", "workers=1", "slots.llamacpp=2", "context_tokens=2048", "speculation=false",
    f"index={INDEX}", "rag=default", "documents=null", "keys=keys.json", "tls_cert=null", "tls_key=null", "drain_seconds=1",
    "trace.otlp_endpoint=null", "log.format=text", "log.level=info", "log.file=null", "log.prompts=false",
)  # fmt: skip
NOT_INHERITED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "PROMETHEUS_MULTIPROC_DIR", "LLMLAB_API_KEY")

Say = Callable[[str], None]


class Sandbox:
    """A healthy stack with traffic, for the length of the block.

    Args:
        say: receives a line for each step.

    Attributes:
        folder: all of it.
        url: of the gateway.
        traffic: who asks it.

    Raises:
        EngineError: on entry, if there is no Prometheus, or something does not start.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.folder = Path(tempfile.mkdtemp(prefix="llmlab-break-"))
        self.port, self.engine_port, self._prometheus_port, self._training_port = (check_free(HOST, 0, "") for _ in range(4))
        self.url = f"http://{HOST}:{self.port}"
        self.docs, self.index, self.runs = (self.folder / name for name in ("docs", "index", "runs"))
        self.log, self.prometheus_folder = self.folder / "gateway.log", self.folder / "prometheus"
        self._admin = secrets.token_hex(16)
        self._stack = ExitStack()
        self._gateway: subprocess.Popen[bytes] | None = None
        self.prometheus: ChildServer
        self.traffic = Traffic(self.url, CLIENTS)

    def __enter__(self) -> Sandbox:
        """Build the index, start everything and wait until it answers."""
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.docs.mkdir()
            for page in PAGES:
                shutil.copyfile(ROOT / "labs" / "knowledge" / f"{page}.md", self.docs / f"{page}.md")
            if load(named("rag", "default"), RagConfig).store:
                raise ConfigError("configs/rag/default.yaml names a store", "an index in files, which can be broken", 'store: ""')
            self.prometheus = self._watch(stack)
            self.sync()
            stack.callback(self._end_gateway)
            self.deploy()
            stack.enter_context(self.traffic)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End all of it and remove the folder."""
        self._stack.close()

    @property
    def prometheus_url(self) -> str:
        """Return where Prometheus answers."""
        return self.prometheus.url

    @property
    def engine_log(self) -> Path:
        """Return the engine's own log."""
        from serving.launch import WORK

        return WORK / f"llamacpp-{self.engine_port}" / "engine.log"

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of a command in here; the user's runs, indexes and keys are out of its sight."""
        kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        own = {"LLMLAB_RUNS": str(self.runs), "LLMLAB_INDEX": str(self.index), "LLMLAB_KEYS": str(self.folder / "keys.json"),
               "LLMLAB_ADMIN_KEY": self._admin, "HF_HUB_OFFLINE": "1"}  # fmt: skip
        path = os.pathsep.join([*filter(None, [more.get("PYTHONPATH")]), str(ROOT)])
        return kept | own | {**more, "PYTHONPATH": path}

    def command(self, *words: str) -> None:
        """Run an `llmlab` command in here to its end; `EngineError` with its last lines if it fails."""
        done = subprocess.run([sys.executable, "-m", "labs", *words], cwd=self.folder, env=self.environment({}), check=False,
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            came = f"llmlab {' '.join(words)} ended with status {done.returncode}:\n{done.stderr[-1000:]}"
            raise EngineError(came, "a command that works in the sandbox", "make doctor")

    def sync(self, *settings: str) -> None:
        """Make the index say what the documents say."""
        self.command("index", "sync", str(self.docs), *_set(settings))

    def deploy(self, settings: Sequence[str] = (), adapter: str = "none", environment: Mapping[str, str] | None = None) -> None:
        """Start the gateway, in the place of one that runs, and wait until it answers."""
        self._end_gateway()
        given = [*SETTINGS, f"port={self.port}", f"engine_port={self.engine_port}", *settings]
        words = [sys.executable, "-m", "labs", "serve", MODEL, "--adapter", adapter, *_set(given)]
        leashed = [sys.executable, "-I", str(LEASH), str(GRACE_SECONDS), *words]
        with self.log.open("ab") as log:
            self._gateway = subprocess.Popen(leashed, cwd=self.folder, stdin=subprocess.PIPE, stdout=log, stderr=log,
                                             env=self.environment(environment or {}), start_new_session=True)  # fmt: skip
        self.wait(self._answers, "the gateway does not answer")

    def ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Return what the gateway answers to an admin.

        Raises:
            EngineError: it refuses.
        """
        import httpx

        headers = {"Authorization": f"Bearer {self._admin}"}
        reply = httpx.request(method, self.url + path, headers=headers, trust_env=False, timeout=60, **more)
        if reply.status_code >= 400:
            raise EngineError(
                f"{method} {path} was answered with {reply.status_code}: {reply.text[:300]}", "a gateway that is well"
            )
        answer: dict[str, Any] = reply.json()
        return answer

    def engine(self) -> psutil.Process | None:
        """Return the process that generates, None while there is none."""
        import psutil

        try:
            children = psutil.Process(self._gateway.pid).children(recursive=True) if self._gateway else []
            return next((child for child in children if child.cmdline()[1:3] == ["-m", "serving.engines.llamacpp"]), None)
        except psutil.Error:
            return None

    def reload_prometheus(self) -> None:
        """Let Prometheus read its configuration again."""
        assert self.prometheus.pid
        os.kill(self.prometheus.pid, signal.SIGHUP)

    def wait(self, condition: Callable[[], object], otherwise: str, seconds: float = READY_SECONDS) -> None:
        """Wait until something is so; `EngineError` with the end of the gateway's log if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self._gateway and self._gateway.poll() is not None):
                end = self.log.read_text(encoding="utf-8", errors="replace")[-1500:] if self.log.exists() else ""
                raise EngineError(f"{otherwise}; the end of its log:\n{end}", "a stack that starts", "make doctor")
            time.sleep(0.1)

    def _watch(self, stack: ExitStack) -> ChildServer:
        folder = self.prometheus_folder
        config = prometheus_server.resolve_config(
            folder, f"{HOST}:{self.port}", f"{HOST}:{self._training_port}", SCRAPE_SECONDS, alertmanager=None
        )
        try:
            server = prometheus_server.PrometheusServer(config, folder / "data", f"{HOST}:{self._prometheus_port}")
            return stack.enter_context(server)
        except (ProgramMissing, ProgramFailed) as problem:
            raise EngineError(str(problem), "a Prometheus server", "make doctor") from None

    def _answers(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def _end_gateway(self) -> None:
        gateway, self._gateway = self._gateway, None
        if gateway and gateway.stdin:
            gateway.stdin.close()  # lets the leash go
            gateway.wait()


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
