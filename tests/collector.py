"""An OTLP receiver, built on the SDK's protobuf classes: it keeps every span that processes export to it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Recorded:
    """One span. Times in seconds since 1970; `error`: why it failed, "" if it did not."""

    trace: str
    id: str
    parent: str
    name: str
    service: str
    kind: int
    began: float
    ended: float
    attributes: dict[str, Any]
    events: tuple[str, ...]
    failed: bool
    error: str


@dataclass
class Collector:
    """Everything received so far."""

    spans: list[Recorded] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, trace: str) -> list[Recorded]:
        """The spans of one trace, by their beginning."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.began)

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_recorded(span, about["service.name"]) for span in scope.spans]


def _recorded(span: Any, service: str) -> Recorded:
    return Recorded(
        span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, service, span.kind,
        span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9, _values(span.attributes),
        tuple(event.name for event in span.events), span.status.code == 2, span.status.message,
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """A running collector."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                data = gzip.decompress(data)
            found.take(data)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
