"""The trace of one request, at a collector: what a call tells the engine, how it ended, whose child it is."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from pdctl.net.openai.api import Counts
from pdctl.net.tracing import Spans
from pdctl.proxy.telemetry.spans import NO_TRACE, Answered, EngineCall, Tracing
from pdctl.proxy.telemetry.timing import Timing
from tests.collector import Recorded, collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode(), b"tracestate": b"vendor=1", b"other": b"x"}
PREFILL, DECODE = EngineCall("prefill", "p0", "r", 0), EngineCall("decode", "d0", "r", 1)


def id_in(lines: bytes) -> str:
    """The span that a call's headers name."""
    found = re.search(rf"traceparent: 00-{TRACE}-([0-9a-f]{{16}})-01\r\n".encode(), lines)
    assert found is not None, lines
    return found[1].decode()


def answered(status: int) -> Answered:
    return Answered("r", "/v1/completions", status, Counts(3, 4), 1)


def test_each_call_is_a_child_that_the_engine_continues() -> None:
    lines: dict[str, bytes] = {}
    with collector() as found:
        tracing = Tracing(Spans(found.endpoint, "pdctl/t", "test"))
        trace, timing = tracing.begin(HEADERS), Timing()
        timing.admitted_at = timing.first_token_at = time.monotonic()
        with trace.call(PREFILL) as lines["prefill"]:
            pass
        with pytest.raises(ValueError, match="broke"), trace.call(DECODE) as lines["decode"]:
            raise ValueError("it broke")
        with pytest.raises(asyncio.CancelledError), trace.call(DECODE):
            raise asyncio.CancelledError
        trace.end(answered(200), timing)
        tracing.close()
    root, *parts = sorted(found.spans, key=lambda span: span.name != "pdctl.request")
    assert (root.trace, root.parent, root.service, root.kind) == (TRACE, PARENT, "pdctl/t", 2)
    assert root.events == ("first_token",)
    assert root.attributes["pdctl.failures"] == 1
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    assert not root.failed
    assert all(span.parent == root.id for span in parts)
    by_id = {span.id: span for span in parts}
    prefill, broken = by_id[id_in(lines["prefill"])], by_id[id_in(lines["decode"])]
    assert (prefill.name, prefill.kind, prefill.failed) == ("prefill", 3, False)
    assert prefill.attributes == {"pdctl.engine": "p0", "pdctl.call": "r", "pdctl.tokens_before": 0}
    assert (broken.failed, broken.error) == (True, "it broke")
    cancelled = next(span for span in parts if "pdctl.cancelled" in span.attributes)
    assert not cancelled.failed
    assert [span.name for span in parts if span.name == "queue"] == ["queue"]
    assert b"tracestate: vendor=1\r\n" in lines["prefill"]


def test_a_failed_request_is_an_error() -> None:
    def recorded(status: int) -> Recorded:
        with collector() as found:
            tracing = Tracing(Spans(found.endpoint, "pdctl/t", "test"))
            tracing.begin({}).end(answered(status), Timing())
            tracing.close()
        return next(span for span in found.spans if span.name == "pdctl.request")

    assert recorded(503).failed
    assert not recorded(429).failed, "the client's fault"


def test_what_the_client_does_not_sample_is_not_recorded() -> None:
    with collector() as found:
        tracing = Tracing(Spans(found.endpoint, "pdctl/t", "test"))
        trace = tracing.begin({b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()})
        with trace.call(PREFILL) as lines:
            assert re.match(rf"traceparent: 00-{TRACE}-[0-9a-f]{{16}}-00\r\n".encode(), lines), "nor by engines"
        trace.end(answered(200), Timing())
        tracing.close()
    assert found.spans == []


def test_a_malformed_context_begins_a_new_trace() -> None:
    with collector() as found:
        tracing = Tracing(Spans(found.endpoint, "pdctl/t", "test"))
        tracing.begin({b"traceparent": b"\xff-nonsense"}).end(answered(200), Timing())
        tracing.close()
    assert {span.trace for span in found.spans} != {TRACE}
    assert len({span.trace for span in found.spans}) == 1


def test_without_a_collector_the_clients_context_goes_on_unchanged() -> None:
    trace = Tracing().begin(HEADERS)
    with trace.call(PREFILL) as first, trace.call(DECODE) as second:
        assert first == second == b"traceparent: %b\r\ntracestate: vendor=1\r\n" % HEADERS[b"traceparent"]
    trace.end(answered(200), Timing())
    assert Tracing().begin({b"tracestate": b"alone"}) is NO_TRACE
