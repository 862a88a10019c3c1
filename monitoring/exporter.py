"""Serve a registry to Prometheus on a port of its own, for work that has no server: a training.

On loopback only, from a thread beside the work, and for as long as the block lasts. It decides nothing about the metrics.

    with Exporter(registry, 8090) as exporter:
        with exporter.lock:  # so that a scrape sees all of a step or nothing of it
            ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

HOST = "127.0.0.1"
PATH = "/metrics"
CLIENT_SECONDS = 5.0  # a client that is silent for so long is dropped
POLL_SECONDS = 0.1  # closing waits at most so long


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ARG002 - the name is the library's
        """Log nothing."""


class _Server(ThreadingWSGIServer):
    def server_bind(self) -> None:
        """Bind without asking the name service for this machine's name, which can take seconds offline."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.socket.getsockname()[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Pass over a client that went away or fell silent."""


class Exporter:
    """A registry at http://127.0.0.1:<port>/metrics until it is closed; use it as a context manager.

    Args:
        registry: what is served.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken, or not allowed.
    """

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        self.lock = threading.Lock()
        self._app: Any = make_wsgi_app(registry)
        self._server = make_server(HOST, port, self._answer, _Server, _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Return where it is served."""
        return f"http://{HOST}:{self._server.server_port}{PATH}"

    def close(self) -> None:
        """Stop serving and give the port back."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Exporter:
        """Serve already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop, whatever happened."""
        self.close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"only {PATH} is served here\n".encode()]
        with self.lock:
            answer: Iterable[bytes] = self._app(environ, start_response)
        return answer
