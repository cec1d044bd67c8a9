"""OpenTelemetry spans of requests, if `otlp_endpoint` is set. The SDK is loaded only then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, cast

from pdctl.errors import PdctlError
from pdctl.net.http_client import header_lines
from pdctl.net.openai_api import Counts
from pdctl.proxy.telemetry.timing import Timing

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


_CONTEXT = (b"traceparent", b"tracestate", b"baggage")


class Spans(Protocol):
    """Begins and ends a request's span. It is falsy if nothing is recorded."""

    def __bool__(self) -> bool:
        """Whether spans are recorded."""
        ...

    def begin(self, headers: dict[bytes, bytes]) -> object:
        """Begin the span of a request, which may have a trace context."""
        ...

    def header(self, trace: object, headers: dict[bytes, bytes]) -> bytes:
        """Header lines that continue the trace on an engine."""
        ...

    def end(self, trace: object, request_id: str, path: str, status: int, counts: Counts, timing: Timing) -> None:
        """End the span of a request; a thread of the SDK exports it with the spans of its phases."""
        ...

    def close(self) -> None:
        """Export the remaining spans."""
        ...


class _NoSpans:
    def __bool__(self) -> bool:
        return False

    def begin(self, headers: dict[bytes, bytes]) -> object:
        return None

    def header(self, trace: object, headers: dict[bytes, bytes]) -> bytes:
        return b""

    def end(self, trace: object, request_id: str, path: str, status: int, counts: Counts, timing: Timing) -> None:
        return

    def close(self) -> None:
        return


NO_SPANS: Spans = _NoSpans()


class OtlpSpans:
    """Exports over HTTP to `endpoint`, such as http://127.0.0.1:4318."""

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.propagate import extract, inject
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as failure:
            hint = "install it with: pip install 'pdctl[otlp]'"
            raise PdctlError(f"proxy.otlp_endpoint needs OpenTelemetry: {failure}", hint) from failure
        self._api, self._extract, self._inject = trace, extract, inject
        self._provider: TracerProvider = TracerProvider(resource=Resource.create({"service.name": service}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pdctl.proxy")

    def __bool__(self) -> bool:
        return True

    def begin(self, headers: dict[bytes, bytes]) -> object:
        """See Spans.begin."""
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items() if name in _CONTEXT}
        parent = self._extract(given) if given else None
        return self._tracer.start_span("pdctl.request", context=parent, kind=self._api.SpanKind.SERVER)

    def header(self, trace: object, headers: dict[bytes, bytes]) -> bytes:
        """See Spans.header."""
        carrier: dict[str, str] = {}
        self._inject(carrier, context=self._within(trace))
        return header_lines(carrier)

    def end(self, trace: object, request_id: str, path: str, status: int, counts: Counts, timing: Timing) -> None:
        """See Spans.end."""
        span = cast("Span", trace)
        now = time.time_ns()
        offset = now - int(time.monotonic() * 1e9)
        attributes: dict[str, str | int] = {
            "http.route": path, "http.response.status_code": status, "pdctl.request_id": request_id,
            "pdctl.prefill": timing.engines[0], "pdctl.decode": timing.engines[1],
            "gen_ai.usage.input_tokens": counts.prompt, "gen_ai.usage.output_tokens": counts.completion,
        }  # fmt: skip
        span.set_attributes(attributes)
        inside = self._within(trace)
        for name, (start, end) in timing.intervals().items():
            part = self._tracer.start_span(name, context=inside, start_time=offset + int(start * 1e9))
            part.end(end_time=offset + int(end * 1e9))
        span.end(end_time=now)

    def close(self) -> None:
        """See Spans.close."""
        self._provider.shutdown()

    def _within(self, trace: object) -> Context:
        return self._api.set_span_in_context(cast("Span", trace))
