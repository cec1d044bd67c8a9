"""OpenTelemetry spans, exported over OTLP/HTTP. The SDK is imported only where spans are exported.

Times are monotonic seconds, and become wall time when a span begins or ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as SdkSpan
    from opentelemetry.trace import SpanKind, Tracer

Attributes = Mapping[str, str | int | float]

# The W3C trace context: https://www.w3.org/TR/trace-context
TRACE_HEADERS = ("traceparent", "tracestate")
# Spans are exported after this long, milliseconds: a process that is killed loses the younger ones.
_EXPORT_MS = 1000
# Time limit of one export, seconds.
_EXPORT_S = 3
# Exports begin for this long after the end of the process was asked for, seconds.
_CLOSE_S = 2


class Spans:
    """Begins spans of one process. `endpoint`: of a collector, such as http://127.0.0.1:4318; `service`: its name
    there."""

    def __init__(self, endpoint: str, service: str, scope: str) -> None:
        """Raises PdctlError if the SDK is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as failure:
            hint = "install it with: pip install 'pdctl[otlp]'"
            raise PdctlError(f"proxy.otlp_endpoint needs OpenTelemetry: {failure}", hint) from failure
        self._propagator = TraceContextTextMapPropagator()
        self._within, self._kinds, self._error = trace.set_span_in_context, trace.SpanKind, trace.StatusCode.ERROR
        self._provider: TracerProvider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, schedule_delay_millis=_EXPORT_MS))
        self._tracer: Tracer = self._provider.get_tracer(scope)

    def received(
        self, name: str, headers: Mapping[str, str], began: float | None = None, attributes: Attributes | None = None
    ) -> Span:
        """Begin the span of a request, in the trace of its sender if its headers name one."""
        context = self._propagator.extract(headers)
        return self._begun(name, context, self._kinds.SERVER, began, attributes or {})

    def close(self) -> None:
        """Export the remaining spans. A collector that does not answer delays this by a few seconds."""
        # The SDK itself waits 30 seconds. An exporter that is shut down drops what is left.
        limit = threading.Timer(_CLOSE_S, self._exporter.shutdown)
        limit.start()
        self._provider.shutdown()
        limit.cancel()

    # -- for Span ------------------------------------------------------------------------------------------

    def child(self, parent: SdkSpan, name: str, is_call: bool, began: float | None, attributes: Attributes) -> Span:
        """See Span.child and Span.call."""
        kind = self._kinds.CLIENT if is_call else self._kinds.INTERNAL
        return self._begun(name, self._within(parent), kind, began, attributes)

    def headers(self, span: SdkSpan) -> dict[str, str]:
        """See Span.headers."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._within(span))
        return carrier

    def fail(self, span: SdkSpan, why: str) -> None:
        """See Span.fail."""
        span.set_status(self._error, why)

    def _begun(self, name: str, context: Context, kind: SpanKind, began: float | None, attributes: Attributes) -> Span:
        at = None if began is None else _wall_ns(began)
        return Span(self, self._tracer.start_span(name, context, kind, dict(attributes), start_time=at))


class Span:
    """A span that has begun."""

    __slots__ = ("_span", "_spans")

    def __init__(self, spans: Spans, span: SdkSpan) -> None:
        self._spans = spans
        self._span = span

    def call(self, name: str, attributes: Attributes) -> Span:
        """Begin the span of a call to another process, within this one."""
        return self._spans.child(self._span, name, True, None, attributes)

    def child(self, name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """Add a part of this span that is over."""
        self._spans.child(self._span, name, False, began, attributes or {}).end(ended)

    def headers(self) -> dict[str, str]:
        """Headers that continue the trace within this span in the process that gets them."""
        return self._spans.headers(self._span)

    def add(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(dict(attributes))

    def event(self, name: str, at: float) -> None:
        """Add a moment."""
        self._span.add_event(name, timestamp=_wall_ns(at))

    def fail(self, why: str) -> None:
        """What the span stands for has failed."""
        self._spans.fail(self._span, why)

    def end(self, at: float | None = None) -> None:
        """End the span now, or at a time; a thread of the SDK exports it."""
        self._span.end(None if at is None else _wall_ns(at))


def traces_url(endpoint: str) -> str:
    """Where a collector takes spans over HTTP."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def _wall_ns(at: float) -> int:
    return time.time_ns() - int((time.monotonic() - at) * 1e9)
