"""Spans of the requests that this engine answers, in the traces of their callers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pdctl.engine.options import EngineOptions
from pdctl.net.tracing import Attributes, Span, Spans


class AnswerSpan:
    """The span of one request; without a span it records nothing."""

    __slots__ = ("_span",)

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    def part(self, name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """Add a part that is over, in monotonic seconds."""
        if self._span is not None:
            self._span.child(name, began, ended, attributes)

    def fail(self, why: str) -> None:
        """The request is answered with an error."""
        if self._span is not None:
            self._span.fail(why)


NOT_RECORDED = AnswerSpan()


class EngineSpans:
    """Records nothing unless the engine has an `otlp_endpoint`."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises PdctlError if the SDK is not installed."""
        self._name = options.name
        name = os.environ.get("OTEL_SERVICE_NAME") or options.name
        self._spans = Spans(options.otlp_endpoint, name, "pdctl.engine") if options.otlp_endpoint else None

    @contextmanager
    def answer(self, what: str, headers: Mapping[str, str], began: float, prompt_tokens: int) -> Iterator[AnswerSpan]:
        """Around the answer to one request. `what`: prefill, decode or generate."""
        if self._spans is None:
            yield NOT_RECORDED
            return
        about: Attributes = {"pdctl.engine": self._name, "gen_ai.usage.input_tokens": prompt_tokens}
        span = self._spans.received(f"engine.{what}", headers, began, about)
        try:
            yield AnswerSpan(span)
        except asyncio.CancelledError:
            span.add({"pdctl.cancelled": True})
            raise
        finally:
            span.end()

    async def close(self) -> None:
        """Export the remaining spans."""
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
