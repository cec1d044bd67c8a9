"""The last requests for the live page: kept only while somebody asks, bounded, with the phases of the last try."""

from __future__ import annotations

import pytest

from pdctl.net.openai.api import Counts
from pdctl.proxy.telemetry.recent import RecentRequests
from pdctl.proxy.telemetry.timing import FailedCall, Timing
from pdctl.proxy_wire import RecentRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(recent: RecentRequests, timing: Timing, name: str = "r") -> RecentRequest:
    recent.ask()
    recent.add(name, "/v1/completions", 200, Counts(10, 5), timing)
    return recent.ask()[-1]


def handed_over() -> Timing:
    timing = Timing(received_at=990.0, admitted_at=991.0)
    timing.engines = ("prefill-0", "decode-0")
    timing.prefilled(993.0)
    timing.token(993.1)
    timing.decode_at = 994.0
    timing.stages = {"hand_over": 0.5, "admission": 0.1, "first_step": 0.2, "bytes": 4096.0}
    return timing


def test_nothing_is_kept_before_somebody_asks() -> None:
    recent = RecentRequests(Clock())
    assert not recent.is_wanted
    assert recent.ask() == ()
    assert recent.is_wanted


def test_nothing_is_kept_long_after_the_last_question() -> None:
    clock = Clock()
    recent = RecentRequests(clock)
    request(recent, handed_over())
    clock.now += 121
    recent.add("late", "/v1/completions", 200, Counts(), handed_over())
    assert not recent.is_wanted
    assert recent.ask() == ()


def test_the_number_of_requests_is_bounded() -> None:
    recent = RecentRequests(Clock())
    recent.ask()
    for number in range(500):
        recent.add(str(number), "/v1/completions", 200, Counts(), handed_over())
    assert [found.id for found in recent.ask()] == [str(number) for number in range(300, 500)]


def test_the_phases_of_a_request() -> None:
    found = request(RecentRequests(Clock()), handed_over())
    assert [(phase.name, phase.engine) for phase in found.phases] == [
        ("queue", ""), ("prefill", "prefill-0"), ("hand_over", "decode-0"), ("admission", "decode-0"),
        ("first_step", "decode-0"), ("decode", "decode-0"),
    ]  # fmt: skip
    assert [phase.end_s for phase in found.phases] == pytest.approx([1.0, 3.0, 3.7, 3.8, 4.0, 10.0])
    assert (found.seconds, found.ttft_s, found.hand_over_bytes) == pytest.approx((10.0, 3.1, 4096))
    assert found.failed == ()


def test_what_a_failed_try_has_left_is_no_phase_of_the_last_one() -> None:
    timing = handed_over()
    timing.failed_at(FailedCall(995.0, "decode-0", ("prefill-0", "decode-0"), 7, "connection lost"))
    timing.engines = ("decode-1", "decode-1")
    found = request(RecentRequests(Clock()), timing)
    assert [(phase.name, phase.begin_s, phase.end_s) for phase in found.phases] == [
        ("queue", 0.0, 1.0), ("decode", 5.0, 10.0),
    ]  # fmt: skip
    (failed,) = found.failed
    assert (failed.at_s, failed.engine, failed.tokens, failed.reason) == (5.0, "decode-0", 7, "connection lost")
    assert (failed.prefill, failed.decode) == ("prefill-0", "decode-0")


def test_a_try_after_a_failure_has_its_own_prefill() -> None:
    timing = handed_over()
    timing.failed_at(FailedCall(995.0, "decode-0", ("prefill-0", "decode-0"), 7, "connection lost"))
    timing.prefilled(997.0)
    timing.decode_at, timing.stages = 998.0, {"hand_over": 0.5}
    found = request(RecentRequests(Clock()), timing)
    assert [(phase.name, phase.begin_s, phase.end_s) for phase in found.phases] == [
        ("queue", 0.0, 1.0), ("prefill", 5.0, 7.0), ("hand_over", 7.5, 8.0), ("decode", 8.0, 10.0),
    ]  # fmt: skip
