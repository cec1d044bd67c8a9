from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.engines.breaker import Breaker, RetryBudget


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(4):
        breaker.failed(at)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    breaker = Breaker()
    for _ in range(20):
        for _ in range(3):
            breaker.failed(0)
        breaker.succeeded()
    assert breaker.allows(0)
    assert not opened().allows(0.4)


def test_one_sure_failure_is_enough() -> None:
    breaker = Breaker()
    breaker.failed(0, sure=True)
    assert not breaker.allows(0.1)


def test_after_its_pause_one_trial_at_a_time() -> None:
    breaker = opened()
    assert breaker.allows(0.6)
    breaker.started(0.6)
    assert breaker.state == "half_open"
    assert not breaker.allows(0.7)
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.allows(0.7)


def test_a_failed_trial_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now = opened(), 0.0
    for expected in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        now += breaker.pause_s
        assert breaker.allows(now)
        breaker.started(now)
        breaker.failed(now)
        assert breaker.pause_s == expected
        assert not breaker.allows(now + expected - 0.01)


def test_a_trial_that_tells_nothing_lets_the_next_one_try() -> None:
    breaker = opened()
    breaker.started(1)
    breaker.abandoned()
    assert breaker.allows(1.1)


def test_a_new_process_begins_with_a_closed_one() -> None:
    breaker = opened()
    breaker.reset()
    assert breaker.allows(0)
    assert breaker.pause_s == 0.5


@given(
    st.lists(st.tuples(st.sampled_from(["started", "failed", "succeeded", "abandoned"]), st.floats(0, 5)), max_size=60)
)
def test_whatever_happened_it_is_tried_again_within_its_longest_pause(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for name, pause in events:
        now += pause
        getattr(breaker, name)(*([now] if name in ("started", "failed") else []))
    assert breaker.allows(now + 30.1)


def test_the_budget_lets_a_burst_through_and_spreads_the_rest() -> None:
    budget = RetryBudget()
    assert [budget.wait_s(0) for _ in range(64)] == [0.0] * 64
    waits = [budget.wait_s(0) for _ in range(40)]
    assert waits == sorted(waits)
    assert 1.5 < waits[-1] < 2.5, "20 a second"
    assert budget.wait_s(100) == 0.0


@given(st.lists(st.floats(0, 1), max_size=300))
def test_retries_never_exceed_the_budget(pauses: list[float]) -> None:
    budget, now, begun = RetryBudget(), 0.0, []
    for pause in pauses:
        now += pause
        begun.append(now + budget.wait_s(now))
    for first in range(len(begun)):
        within = sum(begun[first] <= at < begun[first] + 1 for at in begun)
        assert within <= budget.capacity + budget.per_s + 1
