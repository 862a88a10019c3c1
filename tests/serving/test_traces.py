"""Traces: what a receiver of OTLP over HTTP on loopback gets from the real gateway, read with OpenTelemetry's own protobuf."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError
from serving import traces
from serving.settings import TraceConfig
from tests.serving.conftest import MODEL, environment, fake_service

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """Yield an address that takes spans, and the list of them."""
    trace_service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    spans: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            assert self.path == "/v1/traces"
            sent = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            spans.extend(span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()
    thread.join()


def attributes(span: Any) -> dict[str, Any]:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    return {
        key: [one.string_value for one in value.values] if hasattr(value, "values") else value for key, value in values.items()
    }


def test_a_receiver_sees_request_retrieval_and_generation(
    receiver: tuple[str, list[Any]], tmp_path: Path, index_root: Path
) -> None:
    url, spans = receiver
    with fake_service(tmp_path, f"trace.otlp_endpoint={url}", index=index_root) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "trace"}], "temperature": 0.5}
        answer = client.post("/v1/chat/completions", json=body, headers={"traceparent": CALLER})
        passed_on = answer.json()["choices"][0]["message"]["content"]
        assert client.post("/v1/rag/query", json={"question": "Who made Vela?"}).status_code == 503, "the fake cannot answer"
        client.post("/v1/completions", json={"model": MODEL, "prompt": "trace"})
    by_name = {span.name: span for span in spans}
    request, chat = (
        by_name["POST /v1/chat/completions"],
        next(s for s in spans if s.name == f"chat {MODEL}" and not s.status.code),
    )
    assert request.trace_id.hex() == chat.trace_id.hex() == CALLER[3:35] and request.parent_span_id.hex() == CALLER[36:52]
    assert chat.parent_span_id == request.span_id and passed_on == f"00-{CALLER[3:35]}-{chat.span_id.hex()}-01"
    assert attributes(chat) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "llamacpp", "gen_ai.request.model": MODEL,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.max_tokens": 256, "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2, "gen_ai.response.finish_reasons": ["stop"],
    }  # fmt: skip
    assert attributes(by_name[f"text_completion {MODEL}"])["gen_ai.operation.name"] == "text_completion"
    told = attributes(request)
    assert told["http.route"] == "/v1/chat/completions" and told["http.response.status_code"] == 200
    assert told["llmlab.request.id"] == answer.headers["X-Request-Id"]
    question, search = by_name["POST /v1/rag/query"], by_name["retrieval knowledge"]
    assert search.parent_span_id == question.span_id and attributes(search)["llmlab.retrieval.passages"] > 0
    assert attributes(question)["error.type"] == "503" and question.status.code == 2
    assert "Vela" not in str(spans), "texts are no part of spans"


def test_without_the_extra_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_installed", lambda: False)
    on, off = TraceConfig(otlp_endpoint="http://127.0.0.1:4318"), TraceConfig(otlp_endpoint=None)
    with pytest.raises(ConfigError) as caught:
        traces.check_traces(on)
    assert "make setup-trace" in str(caught.value)
    assert traces.open_traces(off, "llamacpp") is None
    with environment(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318"), pytest.raises(ConfigError):
        traces.check_traces(off)
