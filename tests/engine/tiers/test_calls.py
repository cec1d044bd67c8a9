from __future__ import annotations

import threading

import pytest

from pdctl.engine.tiers import TierFailed
from pdctl.engine.tiers.calls import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker, Caller


def test_a_breaker_waits_longer_after_each_failure() -> None:
    breaker, now, pauses = Breaker(jitter=lambda: 1.0), 100.0, []
    for _ in range(8):
        assert breaker.allows(now)
        breaker.failed(now)
        assert not breaker.allows(now)
        pause = next(step / 100 for step in range(10_000) if breaker.allows(now + step / 100))
        pauses.append(pause)
        now += pause
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S, abs=0.02)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=0.02)
    breaker.worked()
    breaker.failed(now)
    assert breaker.allows(now + FIRST_PAUSE_S), "it begins anew"


class Always(Breaker):
    """One that never waits."""

    def allows(self, now: float) -> bool:
        return True


def test_a_result_and_a_failure_reach_the_caller() -> None:
    caller = Caller("it", Always())
    assert caller.call(lambda: 7, 60) == 7

    def fail() -> int:
        raise TierFailed("no room")

    with pytest.raises(TierFailed, match="no room"):
        caller.call(fail, 60)
    assert caller.call(lambda: 8, 60) == 8
    caller.close()


def test_a_call_that_is_not_late_keeps_nobody_away() -> None:
    """A tier that is read is there: else what becomes idle meanwhile would be dropped."""
    caller, begun, may_end = Caller("it", Breaker()), threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        may_end.wait(60)
        return 1

    results: list[int] = []
    first = threading.Thread(target=lambda: results.append(caller.call(slow, 60)))
    first.start()
    assert begun.wait(60)
    assert caller.is_free
    second = threading.Thread(target=lambda: results.append(caller.call(lambda: 2, 60)))
    second.start()
    may_end.set()
    first.join(60)
    second.join(60)
    assert results == [1, 2]
    caller.close()


def test_a_call_that_waited_for_its_turn_has_all_its_time() -> None:
    caller, begun, may_end = Caller("it", Breaker()), threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        may_end.wait(60)
        return 1

    first = threading.Thread(target=caller.call, args=(slow, 60))
    first.start()
    assert begun.wait(60)
    with pytest.raises(TierFailed, match="busy"):
        caller.call(lambda: 2, 0.05)
    assert caller.is_free, "that another call takes its time is no failure"
    may_end.set()
    first.join(60)
    assert caller.call(lambda: 3, 60) == 3
    caller.close()


def test_while_a_call_is_late_nothing_waits_for_it() -> None:
    caller, may_end, calls = Caller("it", Always()), threading.Event(), list[int]()

    def late() -> int:
        may_end.wait(60)
        return 1

    with pytest.raises(TierFailed, match="does not answer"):
        caller.call(late, 0.05)
    for _ in range(3):
        assert not caller.is_free
        with pytest.raises(TierFailed, match="just now"):
            caller.call(lambda: calls.append(1), 60)
    assert not calls, "nothing was queued behind it"
    may_end.set()
    assert caller._newest is not None
    assert caller._newest.done.wait(60)
    assert caller.call(lambda: 2, 60) == 2
    caller.close()


def test_after_a_failure_it_is_left_alone() -> None:
    caller = Caller("it", Breaker(jitter=lambda: 1.0))

    def fail() -> int:
        raise TierFailed("no")

    with pytest.raises(TierFailed, match="no"):
        caller.call(fail, 60)
    with pytest.raises(TierFailed, match="just now"):
        caller.call(lambda: 1, 60)
    caller.close()
