"""Traces: a span for each request, each search and each generation, sent as OTLP over HTTP.

Names are those of OpenTelemetry's conventions for HTTP and generative AI. Texts are never part of a span. Off unless an endpoint
is set (configs/serve, `trace`, or OTEL_EXPORTER_OTLP_ENDPOINT); its packages are an extra, `make setup-trace`:

    llmlab serve --set trace.otlp_endpoint=http://127.0.0.1:4318
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError
from serving.settings import TraceConfig

if TYPE_CHECKING:
    from opentelemetry import trace

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PATH = "/v1/traces"
CARRIED = ("traceparent", "tracestate")
EXPORT_SECONDS = 5.0


class Span:
    """One span, or nothing at all where there are no traces."""

    def __init__(self, tracer: trace.Tracer | None = None, span: trace.Span | None = None, engine: str = "") -> None:
        self._tracer, self._span, self._engine = tracer, span, engine

    @property
    def trace_id(self) -> str | None:
        """Return the id of the trace in hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}" if self._span else None

    def child(self, name: str, attributes: Mapping[str, Any], *, out: bool = False) -> Span:
        """Return a new span below this one; `out` for one whose work another process does."""
        if self._tracer is None or self._span is None:
            return self
        from opentelemetry import trace

        kind = trace.SpanKind.CLIENT if out else trace.SpanKind.INTERNAL
        told = {**attributes, "gen_ai.provider.name": self._engine} if out else attributes
        own = self._tracer.start_span(name, trace.set_span_in_context(self._span), kind=kind, attributes=told)
        return Span(self._tracer, own, self._engine)

    def set(self, name: str, value: Any) -> None:
        """Set an attribute; None sets nothing."""
        if self._span and value is not None:
            self._span.set_attribute(name, value)

    def rename(self, name: str) -> None:
        """Give the span its final name."""
        if self._span:
            self._span.update_name(name)

    def headers(self) -> dict[str, str]:
        """Return the headers that let another process go on with the trace."""
        carrier: dict[str, str] = {}
        if self._span:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def end(self, error: BaseException | str | None = None) -> None:
        """End the span; of an error only its type is told."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", error if isinstance(error, str) else type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


NO_SPAN = Span()


class Traces:
    """Makes the spans of requests and sends them in the background.

    Args:
        endpoint: where OTLP over HTTP is listened to, without a path; None for what the environment says.
        engine: that generates.
    """

    def __init__(self, endpoint: str | None, engine: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(endpoint and endpoint.rstrip("/") + PATH, timeout=EXPORT_SECONDS)
        name = os.environ.get("OTEL_SERVICE_NAME", "llmlab")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer, self._engine = self._provider.get_tracer("llmlab"), engine

    def request(self, method: str, headers: Mapping[bytes, bytes], id: str) -> Span:
        """Return the span of a request; it goes on with the trace of the caller, if there is one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name.encode()].decode("latin-1") for name in CARRIED if name.encode() in headers}
        context = TraceContextTextMapPropagator().extract(carrier)
        attributes = {"http.request.method": method, "llmlab.request.id": id}
        span = self._tracer.start_span("request", context, kind=SpanKind.SERVER, attributes=attributes)
        return Span(self._tracer, span, self._engine)

    async def close(self) -> None:
        """Send what is left and end."""
        from starlette.concurrency import run_in_threadpool

        await run_in_threadpool(self._provider.shutdown)


def open_traces(config: TraceConfig, engine: str) -> Traces | None:
    """Return where spans go, or None if traces are off.

    Raises:
        ConfigError: they are on, and their packages are not installed.
    """
    if not check_traces(config):
        return None
    return Traces(config.otlp_endpoint, engine)


def check_traces(config: TraceConfig) -> bool:
    """Return True if traces are on; `ConfigError` if they are and their packages are not installed."""
    wanted = config.otlp_endpoint or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    if wanted and not _installed():
        raise ConfigError("traces are on, and the packages that send them are not installed",
                          "OpenTelemetry's SDK and its OTLP exporter", "make setup-trace, or unset trace.otlp_endpoint and "
                          + " and ".join(VARIABLES))  # fmt: skip
    return bool(wanted)


def _installed() -> bool:
    try:
        return all(find_spec(f"opentelemetry.{name}") for name in ("sdk.trace", "exporter.otlp.proto.http"))
    except ModuleNotFoundError:
        return False
