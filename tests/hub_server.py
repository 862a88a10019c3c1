"""A hub on loopback that answers the hub's own client: data sets and models, each at one commit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "team/gated"

Repositories = Mapping[str, Mapping[str, bytes]]  # files by path, by OWNER/NAME


@dataclass
class Hub:
    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def running(data_sets: Repositories, models: Repositories) -> Iterator[Hub]:
    """Serve repositories at `COMMIT`; any other is unknown, and `GATED` is gated."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if self.command == "GET":
                hub.asked.append(path)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self.describe(data_sets, "/".join(parts[2:4]), parts[4:])
            elif parts[:2] == ["api", "models"]:
                self.describe(models, "/".join(parts[2:4]), parts[4:])
            elif parts[0] == "datasets" and parts[3] == "resolve":
                self.send(data_sets["/".join(parts[1:3])], parts[4], "/".join(parts[5:]))
            elif parts[2:3] == ["resolve"]:
                self.send(models["/".join(parts[:2])], parts[3], "/".join(parts[4:]))
            else:
                self.reply(200, b"")

        do_HEAD = do_GET

        def describe(self, repositories: Repositories, name: str, what: list[str]) -> None:
            if name == GATED:
                self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif name not in repositories:
                self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif what[1:] and what[1] not in ("main", COMMIT):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif what[:1] == ["tree"]:
                files = [{"type": "file", "path": file, "size": len(content), "oid": oid(content)}
                         for file, content in repositories[name].items()]  # fmt: skip
                self.reply(200, json.dumps(files).encode())
            else:
                siblings = [{"rfilename": file, "size": len(content)} for file, content in repositories[name].items()]
                self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

        def send(self, files: Mapping[str, bytes], revision: str, file: str) -> None:
            assert revision == COMMIT
            self.reply(200, files[file], {"ETag": f'"{oid(files[file])}"', "X-Repo-Commit": COMMIT})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def oid(content: bytes) -> str:
    """Return the name that git gives to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
