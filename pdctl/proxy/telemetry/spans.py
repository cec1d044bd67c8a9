"""The trace of one client request: a span for it, one for its time in the queue, and one for each call to an engine.

Each call carries its own span in `traceparent`, so the spans of the engine are its children. Without `otlp_endpoint`
nothing is recorded, and the client's trace context goes to the engines as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

from pdctl.net.http_client import header_lines
from pdctl.net.openai.api import Counts
from pdctl.net.tracing import TRACE_HEADERS, Attributes, Span, Spans
from pdctl.proxy.telemetry.timing import Timing

_NAMES = tuple(name.encode() for name in TRACE_HEADERS)


class EngineCall(NamedTuple):
    """A call to an engine. `what`: prefill or decode; `tokens`: how many the client has before it."""

    what: str
    engine: str
    name: str
    tokens: int


class Answered(NamedTuple):
    """The end of a request. `failures`: calls that failed."""

    request_id: str
    path: str
    status: int
    counts: Counts
    failures: int


class RequestTrace(Protocol):
    """The trace of one request."""

    def call(self, called: EngineCall) -> AbstractContextManager[bytes]:
        """Around one call; gives the header lines that continue the trace at the engine."""
        ...

    def end(self, answered: Answered, timing: Timing) -> None:
        """The request is over."""
        ...


class PassedOn:
    """Records nothing. `lines`: the client's trace context, for the engines."""

    __slots__ = ("_around",)

    def __init__(self, lines: bytes) -> None:
        self._around = nullcontext(lines)

    def call(self, called: EngineCall) -> AbstractContextManager[bytes]:
        """See RequestTrace.call."""
        return self._around

    def end(self, answered: Answered, timing: Timing) -> None:
        """See RequestTrace.end."""


NO_TRACE = PassedOn(b"")


class Tracing:
    """Begins traces. `spans`: None if nothing is recorded."""

    def __init__(self, spans: Spans | None = None) -> None:
        self._spans = spans

    def __bool__(self) -> bool:
        """Whether spans are recorded."""
        return self._spans is not None

    def begin(self, headers: dict[bytes, bytes]) -> RequestTrace:
        """The trace of a request with these headers."""
        if self._spans is not None:
            given = {name.decode("latin-1"): value.decode("latin-1") for name, value in _context_of(headers)}
            return _Recorded(self._spans.received("pdctl.request", given))
        if _NAMES[0] not in headers:
            return NO_TRACE
        return PassedOn(b"".join(b"%b: %b\r\n" % header for header in _context_of(headers)))

    def close(self) -> None:
        """Export the remaining spans."""
        if self._spans is not None:
            self._spans.close()


def _context_of(headers: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((name, headers[name]) for name in _NAMES if name in headers)


class _Recorded:
    """A trace that is recorded."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @contextmanager
    def call(self, called: EngineCall) -> Iterator[bytes]:
        """See RequestTrace.call. A call that is cancelled has not failed: it was not needed any more."""
        attributes: Attributes = {
            "pdctl.engine": called.engine, "pdctl.call": called.name, "pdctl.tokens_before": called.tokens,
        }  # fmt: skip
        span = self._span.call(called.what, attributes)
        try:
            yield header_lines(span.headers())
        except asyncio.CancelledError:
            span.add({"pdctl.cancelled": True})
            raise
        except Exception as failure:
            span.fail(str(failure))
            raise
        finally:
            span.end()

    def end(self, answered: Answered, timing: Timing) -> None:
        """See RequestTrace.end."""
        span = self._span
        span.add({
            "http.route": answered.path, "http.response.status_code": answered.status,
            "pdctl.request_id": answered.request_id, "pdctl.prefill": timing.engines[0],
            "pdctl.decode": timing.engines[1], "pdctl.failures": answered.failures,
            "gen_ai.usage.input_tokens": answered.counts.prompt,
            "gen_ai.usage.output_tokens": answered.counts.completion,
        })  # fmt: skip
        span.child("queue", timing.received_at, timing.admitted_at or timing.received_at)
        if timing.first_token_at:
            span.event("first_token", timing.first_token_at)
        if answered.status >= 500:
            span.fail(f"status {answered.status}")
        span.end()
