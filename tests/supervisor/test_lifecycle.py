from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.supervisor.lifecycle import (
    Action,
    Do,
    Event,
    Exit,
    Kind,
    Life,
    Phase,
    Policy,
    advance,
    backoff_s,
    describe_exit,
)

POLICY = Policy(max_restarts=3, within_s=60)
CRASH = Exit(1, None)


def go(life: Life, *events: Event) -> tuple[Life, tuple[Action, ...]]:
    actions: tuple[Action, ...] = ()
    for event in events:
        life, actions = advance(life, event, POLICY)
    return life, actions


def dos(actions: tuple[Action, ...]) -> list[Do]:
    return [action.do for action in actions]


START, OK, STOP = Event(Kind.START), Event(Kind.PROBE_OK), Event(Kind.STOP)


def exited(now: float = 0.0, exit_: Exit = CRASH, chance: float = 0.5) -> Event:
    return Event(Kind.EXITED, now, chance, exit_)


def test_pending_to_starting_to_ready() -> None:
    life, actions = go(Life(), START)
    assert (life.phase, dos(actions)) == (Phase.STARTING, [Do.SPAWN])
    life, actions = go(life, OK)
    assert (life.phase, actions) == (Phase.READY, ())


def test_ready_to_backoff_to_starting_at_once_the_first_time() -> None:
    life, actions = go(Life(), START, OK, exited(exit_=Exit(None, 9)))
    assert life.phase is Phase.BACKOFF
    assert actions == (Action(Do.ARM_BACKOFF, 0.0),)
    assert life.reason == "killed by SIGKILL"
    life, actions = go(life, START)
    assert (life.phase, life.restarts, dos(actions)) == (Phase.STARTING, 1, [Do.SPAWN])


def test_a_restart_budget_ends_in_failed_with_the_reason() -> None:
    life = Life()
    for now in range(3):
        life, _ = go(life, START, exited(float(now)))
        assert life.phase is Phase.BACKOFF
    life, actions = go(life, START, exited(3.0))
    assert (life.phase, actions) == (Phase.FAILED, ())
    assert life.reason == "exited with code 1; 4 failed starts"


def test_slow_failing_starts_use_up_the_budget() -> None:
    life = Life()
    for now in range(0, 1000, 300):
        life, _ = go(life, START, exited(float(now)))
    assert life.phase is Phase.FAILED


def test_exits_long_ago_do_not_count() -> None:
    life = Life()
    for now in range(0, 1000, 61):
        life, actions = go(life, START, OK, exited(float(now)))
        assert actions == (Action(Do.ARM_BACKOFF, 0.0),)


@pytest.mark.parametrize("code", [2, 64, 78])
def test_an_exit_that_a_restart_cannot_cure_fails_at_once(code: int) -> None:
    life, actions = go(Life(), START, exited(exit_=Exit(code, None)))
    assert (life.phase, actions) == (Phase.FAILED, ())
    assert "a restart would not help" in life.reason


def test_starting_too_long_is_killed_and_counts_as_an_exit() -> None:
    life, actions = go(Life(), START, Event(Kind.STARTUP_TIMEOUT))
    assert dos(actions) == [Do.KILL_TREE]
    life, _ = go(life, exited(exit_=Exit(None, 9)))
    assert (life.phase, life.reason) == (Phase.BACKOFF, "not ready in time")


def test_what_cannot_be_spawned_has_failed() -> None:
    life, _ = go(Life(), START, Event(Kind.CANNOT_SPAWN, detail="no such file"))
    assert (life.phase, life.reason) == (Phase.FAILED, "no such file")


@pytest.mark.parametrize("before", [(START,), (START, OK)])
def test_stop_terminates_then_kills_then_is_stopped(before: tuple[Event, ...]) -> None:
    life, actions = go(Life(), *before, STOP)
    assert (life.phase, dos(actions)) == (Phase.STOPPING, [Do.TERMINATE])
    life, actions = go(life, Event(Kind.GRACE_OVER))
    assert (life.phase, dos(actions)) == (Phase.STOPPING, [Do.KILL_TREE])
    life, actions = go(life, exited(exit_=Exit(None, 9)))
    assert (life.phase, actions) == (Phase.STOPPED, ())


@pytest.mark.parametrize("before", [(), (START, exited())])
def test_stop_of_what_does_not_run_is_stopped_at_once_and_stays_so(before: tuple[Event, ...]) -> None:
    life, actions = go(Life(), *before, STOP)
    assert (life.phase, actions) == (Phase.STOPPED, ())
    life, actions = go(life, START)
    assert (life.phase, actions) == (Phase.STOPPED, ()), "a back-off timer that fires late starts nothing"


def test_late_events_change_nothing() -> None:
    ready, _ = go(Life(), START, OK)
    for event in (START, OK, Event(Kind.STARTUP_TIMEOUT), Event(Kind.GRACE_OVER), Event(Kind.CANNOT_SPAWN)):
        assert advance(ready, event, POLICY) == (ready, ())


def test_backoff_grows_to_its_ceiling_and_is_spread() -> None:
    assert [backoff_s(n, 1.0) for n in (1, 2, 3, 4, 20)] == [0, 0.5, 1, 2, 30]
    assert backoff_s(20, 0.25) == 7.5


def test_exits_are_described_for_people() -> None:
    assert describe_exit(Exit(None, 11)) == "killed by SIGSEGV"
    assert describe_exit(Exit(None, 64)) == "killed by signal 64"
    assert describe_exit(Exit(3, None)) == "exited with code 3"


KINDS = st.sampled_from(list(Kind))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(KINDS, st.floats(0, 40), st.sampled_from([Exit(0, None), CRASH, Exit(None, 9), Exit(78, None)])),
        max_size=40,
    )
)
def test_any_order_of_events(history: list[tuple[Kind, float, Exit]]) -> None:
    """Never two lives at once, the budget holds, and stop always leads to an end."""
    life, now, alive = Life(), 0.0, False
    for kind, wait, exit_ in history:
        now += wait
        if kind is Kind.EXITED and not alive:
            continue  # only what lives can exit
        life, actions = advance(life, Event(kind, now, 0.5, exit_), POLICY)
        if kind in (Kind.EXITED, Kind.CANNOT_SPAWN):
            alive = alive and kind is not Kind.EXITED
        if Do.SPAWN in dos(actions):
            assert not alive, "two lives at once"
            alive = True
        if Kind.CANNOT_SPAWN is kind and life.phase is Phase.FAILED:
            alive = False
        assert len(life.exits) <= POLICY.max_restarts + 1
        assert alive == (life.phase in (Phase.STARTING, Phase.READY, Phase.STOPPING))
    life, _ = advance(life, STOP, POLICY)
    if alive:
        life, _ = advance(life, exited(now), POLICY)
    assert life.phase in (Phase.STOPPED, Phase.FAILED)
