"""The whole trace of a request whose decode engine died: proxy, prefill, hand-over and decode, of real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.collector import Collector, Recorded, collector
from tests.service import Run, Service, events, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
PARENT = "b7ad6b7169203331"
LONG = 400


@pytest.fixture(scope="module")
def traced(module_run: Run) -> Iterator[tuple[Service, Collector]]:
    with collector() as found:
        extra = f'otlp_endpoint = "{found.endpoint}"'
        with running(module_run, topology(extra=extra, decodes=2)) as service:
            service.healthy()
            yield service, found


def headers(trace: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{PARENT}-01"}


def named(spans: list[Recorded], name: str) -> list[Recorded]:
    return [span for span in spans if span.name == name]


def one(spans: list[Recorded], name: str) -> Recorded:
    (found,) = named(spans, name)
    return found


def complete(found: Collector, trace: str, lost: int = 0) -> list[Recorded]:
    """The spans of a trace, once each one's parent is there and all calls that did not fail have an engine's span.
    `lost`: parents that nobody tells any more."""

    def spans() -> list[Recorded] | None:
        known = found.of(trace)
        ids, parents = {span.id for span in known}, {span.parent for span in known}
        calls = [span for span in known if span.name in ("prefill", "decode") and not span.failed]
        ended = named(known, "pdctl.request") and all(call.id in parents for call in calls)
        return known if ended and len(parents - ids - {PARENT}) == lost else None

    result: list[Recorded] = wait_until(spans, what="the whole trace")
    return result


def test_the_spans_of_a_request(traced: tuple[Service, Collector]) -> None:
    service, found = traced
    trace = "1" * 32
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    assert service.client.post("/v1/completions", json=body, headers=headers(trace)).status_code == 200
    spans = complete(found, trace)
    root = one(spans, "pdctl.request")
    assert (root.parent, root.service) == (PARENT, "pdctl/t")
    calls = {name: one(spans, name) for name in ("prefill", "decode")}
    assert all(call.parent == root.id for call in calls.values())
    for name, call in calls.items():
        inside = one(spans, f"engine.{name}")
        assert (inside.parent, inside.service) == (call.id, f"pdctl/t/{call.attributes['pdctl.engine']}")
        # An engine's span ends after its last byte, when the caller may have it already.
        assert call.began <= inside.began <= call.ended, "clocks of one host"
        assert inside.began <= inside.ended
    decode = one(spans, "engine.decode")
    parts = [one(spans, name) for name in ("admission", "hand_over", "first_step")]
    assert all(part.parent == decode.id for part in parts)
    hand_over = parts[1]
    assert hand_over.attributes["pdctl.from"] == "prefill-0"
    assert hand_over.attributes["pdctl.bytes"] > 0
    ends = [part.ended for part in parts]
    assert ends == sorted(ends)
    assert not any(span.failed for span in spans)


def test_a_request_that_an_engine_refuses(traced: tuple[Service, Collector]) -> None:
    service, found = traced
    trace = "2" * 32
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stop_token_ids": [10**8]}
    assert service.client.post("/v1/completions", json=body, headers=headers(trace)).status_code == 400

    def failed() -> Recorded | None:
        return next((span for span in named(found.of(trace), "prefill") if span.failed), None)

    assert wait_until(failed, what="the failed call").error


def test_a_request_that_met_a_decode_death(traced: tuple[Service, Collector]) -> None:
    service, found = traced
    trace = "3" * 32
    tokens, victim = 0, ""
    body = {"prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "stream": True}  # fmt: skip
    with service.client.stream("POST", "/v1/completions", json=body, headers=headers(trace)) as answer:
        stream = events(answer)
        for event in stream:
            assert event is not None, "the stream was too short"
            tokens += len(event["choices"][0]["token_ids"])
            if tokens > 4:
                victim = next(n for n in ("decode-0", "decode-1") if service.engine_state(n)["running"])
                before = service.process(victim)
                # The engine exports the parts of a hand-over when they end. It must not answer faster than that.
                psutil.Process(before.pid).children()[0].suspend()
                wait_until(lambda: named(found.of(trace), "first_step"), what="the hand-over's spans")
                os.kill(pid_of(before), signal.SIGKILL)
                break
        for event in stream:
            assert event is None or "error" not in event, event
            tokens += len(event["choices"][0]["token_ids"]) if event else 0
    assert tokens == LONG
    service.restarted(before)
    spans = complete(found, trace, lost=1)
    root = one(spans, "pdctl.request")
    assert (root.attributes["http.response.status_code"], root.attributes["pdctl.failures"]) == (200, 1)
    assert root.attributes["gen_ai.usage.output_tokens"] == LONG
    first, second = named(spans, "decode")
    assert (first.failed, second.failed) == (True, False)
    assert "connection" in first.error
    assert first.attributes["pdctl.engine"] == victim
    assert second.attributes["pdctl.engine"].startswith("decode")
    assert first.attributes["pdctl.tokens_before"] == 1
    assert second.attributes["pdctl.tokens_before"] > 4
    assert second.began >= first.ended
    again = named(spans, "prefill")
    assert len(again) == 2
    assert again[0].attributes["pdctl.tokens_before"] == 0
    inside = one(spans, "engine.decode")
    assert inside.parent == second.id, "the dead engine could not tell its own span"
    lost, read = named(spans, "hand_over")
    assert read.parent == inside.id
    assert lost.parent not in {span.id for span in spans}, "but it had told of the hand-over"
    assert {span.trace for span in spans} == {trace}
    engines = {victim, second.attributes["pdctl.engine"]}
    assert {span.service for span in spans} == {"pdctl/t", "pdctl/t/prefill-0", *(f"pdctl/t/{n}" for n in engines)}
