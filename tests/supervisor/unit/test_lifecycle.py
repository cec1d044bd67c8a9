from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdctl.supervisor.unit.lifecycle import (
    ENDED,
    LIVE,
    Action,
    Do,
    Exit,
    Goal,
    Kind,
    Life,
    LifecycleEvent,
    Phase,
    RestartPolicy,
    advance,
    backoff_s,
    describe_exit,
)

POLICY = RestartPolicy(max_restarts=3, within_s=60, signals=2)
CRASH = Exit(1, None)
KILLED = Exit(None, 9)


def go(life: Life, *events: LifecycleEvent) -> tuple[Life, list[Do]]:
    """Feed events; returns the actions of the last one."""
    actions: tuple[Action, ...] = ()
    for event in events:
        life, actions = advance(life, event, POLICY)
    return life, [action.do for action in actions]


START, OK, STOP, RESTART, RESUME, DRAINED, GRACE_OVER, CLEARED = (
    LifecycleEvent(Kind.START),
    LifecycleEvent(Kind.PROBE_OK),
    LifecycleEvent(Kind.STOP),
    LifecycleEvent(Kind.RESTART),
    LifecycleEvent(Kind.RESUME),
    LifecycleEvent(Kind.DRAINED),
    LifecycleEvent(Kind.GRACE_OVER),
    LifecycleEvent(Kind.CLEARED),
)


def exited(exit_: Exit = CRASH) -> LifecycleEvent:
    return LifecycleEvent(Kind.EXITED, exit=exit_)


def cleared(now: float = 0.0, chance: float = 0.5) -> LifecycleEvent:
    return LifecycleEvent(Kind.CLEARED, now, chance)


def drain(goal: Goal) -> LifecycleEvent:
    return LifecycleEvent(Kind.DRAIN, goal=goal)


def ended(now: float = 0.0, exit_: Exit = CRASH) -> tuple[LifecycleEvent, LifecycleEvent]:
    return exited(exit_), cleared(now)


READY, _ = go(Life(), START, OK)


def test_pending_to_starting_to_ready() -> None:
    life, actions = go(Life(), START)
    assert (life.phase, actions) == (Phase.STARTING, [Do.SPAWN])
    life, actions = go(life, OK)
    assert (life.phase, actions) == (Phase.READY, [Do.ARM_STABLE])


def test_an_exit_is_cleared_up_before_anything_else() -> None:
    life, actions = go(READY, exited(KILLED))
    assert (life.phase, actions) == (Phase.CLEARING, [Do.CLEAR])
    for event in (START, OK, GRACE_OVER, exited()):
        assert go(life, event) == (life, []), "nothing is started next to what is left of the old one"


def test_ready_to_backoff_to_starting_at_once_the_first_time() -> None:
    life, actions = advance(go(READY, exited(KILLED))[0], cleared(), POLICY)
    assert life.phase is Phase.BACKOFF
    assert actions == (Action(Do.ARM_BACKOFF, 0.0),)
    assert life.reason == "killed by SIGKILL"
    life, dos = go(life, START)
    assert (life.phase, life.restarts, dos) == (Phase.STARTING, 1, [Do.SPAWN])


def test_a_restart_budget_ends_in_failed_with_the_reason() -> None:
    life = Life()
    for now in range(3):
        life, _ = go(life, START, *ended(float(now)))
        assert life.phase is Phase.BACKOFF
    life, actions = go(life, START, *ended(3.0))
    assert (life.phase, actions) == (Phase.FAILED, [])
    assert life.reason == "exited with code 1; 4 failed starts"


def test_slow_failing_starts_use_up_the_budget() -> None:
    life = Life()
    for now in range(0, 1000, 300):
        life, _ = go(life, START, *ended(float(now)))
    assert life.phase is Phase.FAILED


def test_exits_long_ago_do_not_count() -> None:
    life = Life()
    for now in range(0, 1000, 61):
        life, _ = go(life, START, OK, LifecycleEvent(Kind.STABLE), *ended(float(now)))
        assert life.phase is Phase.BACKOFF


def test_a_stable_time_makes_the_next_restart_immediate_again() -> None:
    life, _ = go(Life(), START, OK, *ended(0.0), START, OK, *ended(1.0), START, OK)
    assert life.streak == 2
    steady, _ = go(life, LifecycleEvent(Kind.STABLE))
    assert advance(go(steady, exited())[0], cleared(2.0), POLICY)[1] == (Action(Do.ARM_BACKOFF, 0.0),)
    assert advance(go(life, exited())[0], cleared(2.0), POLICY)[1][0].seconds > 0


@pytest.mark.parametrize("code", [2, 64, 78])
def test_an_exit_that_a_restart_cannot_cure_fails_at_once(code: int) -> None:
    life, actions = go(Life(), START, *ended(exit_=Exit(code, None)))
    assert (life.phase, actions) == (Phase.FAILED, [])
    assert "a restart would not help" in life.reason
    again, _ = go(READY, *ended(exit_=Exit(code, None)))
    assert again.phase is Phase.BACKOFF, "its command line was good"


def test_starting_too_long_is_killed_and_counts_as_an_exit() -> None:
    life, actions = go(Life(), START, LifecycleEvent(Kind.STARTUP_TIMEOUT))
    assert actions == [Do.KILL_TREE]
    life, _ = go(life, *ended(exit_=KILLED))
    assert (life.phase, life.reason) == (Phase.BACKOFF, "not ready in time")


@pytest.mark.parametrize("before", [(), (drain(Goal.HOLD),), (drain(Goal.HOLD), DRAINED)])
def test_what_hangs_is_killed_and_started_again(before: tuple[LifecycleEvent, ...]) -> None:
    life, actions = go(READY, *before, LifecycleEvent(Kind.NOT_ALIVE, detail="hung"))
    assert actions == [Do.KILL_TREE]
    life, _ = go(life, *ended(exit_=KILLED))
    assert (life.phase, life.reason) == (Phase.BACKOFF, "hung")


def test_what_cannot_be_spawned_has_failed() -> None:
    life, _ = go(Life(), START, LifecycleEvent(Kind.CANNOT_SPAWN, detail="no such file"))
    assert (life.phase, life.reason) == (Phase.FAILED, "no such file")


@pytest.mark.parametrize("before", [(START,), (START, OK)])
def test_stop_sends_each_signal_then_kills_then_is_stopped(before: tuple[LifecycleEvent, ...]) -> None:
    life, actions = advance(go(Life(), *before)[0], STOP, POLICY)
    assert (life.phase, actions) == (Phase.STOPPING, (Action(Do.SIGNAL, number=0),))
    life, actions = advance(life, GRACE_OVER, POLICY)
    assert actions == (Action(Do.SIGNAL, number=1),)
    life, dos = go(life, GRACE_OVER)
    assert (life.phase, dos) == (Phase.STOPPING, [Do.KILL_TREE])
    life, dos = go(life, *ended(exit_=KILLED))
    assert (life.phase, dos) == (Phase.STOPPED, [])


@pytest.mark.parametrize("before", [(), (START, *ended())])
def test_stop_of_what_does_not_run_is_stopped_at_once_and_stays_so(before: tuple[LifecycleEvent, ...]) -> None:
    life, actions = go(Life(), *before, STOP)
    assert (life.phase, actions) == (Phase.STOPPED, [])
    assert go(life, START) == (life, []), "a back-off timer that fires late starts nothing"


def test_restart_is_no_crash() -> None:
    life, _ = go(READY, RESTART, *ended(exit_=Exit(0, None)))
    assert (life.phase, life.exits, life.reason) == (Phase.PENDING, (), "")
    assert go(life, START)[1] == [Do.SPAWN]


@pytest.mark.parametrize(
    ("goal", "after"), [(Goal.HOLD, Phase.DRAINED), (Goal.STOP, Phase.STOPPING), (Goal.AGAIN, Phase.STOPPING)]
)
def test_drain_then(goal: Goal, after: Phase) -> None:
    life, actions = go(READY, drain(goal))
    assert (life.phase, actions) == (Phase.DRAINING, [Do.DRAIN])
    life, actions = go(life, DRAINED)
    assert life.phase is after
    assert actions == ([] if goal is Goal.HOLD else [Do.SIGNAL])


@pytest.mark.parametrize("before", [(drain(Goal.HOLD),), (drain(Goal.HOLD), DRAINED), (drain(Goal.STOP),)])
def test_a_drained_one_comes_back_into_service(before: tuple[LifecycleEvent, ...]) -> None:
    life, actions = go(READY, *before, RESUME)
    assert (life.phase, actions) == (Phase.READY, [])
    assert go(life, DRAINED) == (life, []), "a drain that ends late stops nothing"


def test_a_crash_while_it_drains_for_a_stop_is_the_stop() -> None:
    assert go(READY, drain(Goal.STOP), *ended())[0].phase is Phase.STOPPED
    assert go(READY, drain(Goal.AGAIN), *ended())[0].phase is Phase.PENDING
    assert go(READY, drain(Goal.HOLD), *ended())[0].phase is Phase.BACKOFF


@pytest.mark.parametrize("event", [RESUME, RESTART, drain(Goal.AGAIN)])
def test_start_after_a_failure_forgets_the_budget(event: LifecycleEvent) -> None:
    failed, _ = go(Life(), START, *ended(exit_=Exit(78, None)))
    life, _ = go(failed, event)
    assert (life.phase, life.exits, life.reason) == (Phase.PENDING, (), "")


@pytest.mark.parametrize("event", [RESUME, RESTART])
def test_start_during_a_backoff_does_not_wait_for_it(event: LifecycleEvent) -> None:
    waiting, _ = go(READY, *ended())
    assert go(waiting, event)[1] == [Do.SPAWN]


def test_start_and_stop_while_it_stops() -> None:
    stopping, _ = go(READY, STOP)
    assert go(stopping, RESUME, *ended())[0].phase is Phase.PENDING
    assert go(stopping, RESUME, STOP, *ended())[0].phase is Phase.STOPPED
    clearing, _ = go(READY, exited())
    assert go(clearing, STOP, CLEARED)[0].phase is Phase.STOPPED


def test_late_events_change_nothing() -> None:
    late = (LifecycleEvent(Kind.STARTUP_TIMEOUT), LifecycleEvent(Kind.CANNOT_SPAWN))
    for event in (START, OK, *late, GRACE_OVER, CLEARED, DRAINED):
        assert go(READY, event) == (READY, [])


def test_backoff_grows_to_its_ceiling_and_is_spread() -> None:
    assert [backoff_s(n, 1.0) for n in (1, 2, 3, 4, 20)] == [0, 0.5, 1, 2, 60]
    assert backoff_s(20, 0.25) == 15


def test_exits_are_described_for_people() -> None:
    assert describe_exit(Exit(None, 11)) == "killed by SIGSEGV"
    assert describe_exit(Exit(None, 64)) == "killed by signal 64"
    assert describe_exit(Exit(3, None)) == "exited with code 3"
    assert "no supervisor" in describe_exit(Exit(None, None))


EXITS = st.sampled_from([Exit(0, None), CRASH, KILLED, Exit(78, None), Exit(None, None)])
ANYTHING = st.sampled_from([kind for kind in Kind if kind not in (Kind.EXITED, Kind.CLEARED)])


class AnyOrder(RuleBasedStateMachine):
    """Events in any order that is possible: only a living process exits, only an exited one is cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.now = 0.0
        self.alive = self.left = False
        self.automatic: list[float] = []

    @initialize()
    def begin(self) -> None:
        self.feed(START)

    def feed(self, event: LifecycleEvent, by_people: bool = False) -> None:
        before = self.life
        self.life, actions = advance(self.life, event, POLICY)
        dos = [action.do for action in actions]
        assert dos.count(Do.SPAWN) <= 1
        if Do.SPAWN in dos:
            assert not self.alive, "two incarnations at once"
            assert not self.left, "something of the old one is left"
            self.alive = True
            if before.phase is Phase.BACKOFF and not by_people:
                self.automatic.append(self.now)
        if event.kind is Kind.CANNOT_SPAWN and before.phase is Phase.STARTING:
            self.alive = False
        if by_people:
            self.automatic.clear()

    @rule(kind=ANYTHING, wait=st.floats(0, 40), goal=st.sampled_from([Goal.HOLD, Goal.STOP, Goal.AGAIN]))
    def anything(self, kind: Kind, wait: float, goal: Goal) -> None:
        self.now += wait
        # A drain with the goal "again" is a user's restart as well: it forgets the budget of what has failed.
        again = kind in (Kind.RESUME, Kind.RESTART) or (kind is Kind.DRAIN and goal is Goal.AGAIN)
        self.feed(LifecycleEvent(kind, self.now, 0.5, goal=goal), by_people=again)

    @precondition(lambda self: self.alive)
    @rule(exit_=EXITS)
    def exits(self, exit_: Exit) -> None:
        self.alive, self.left = False, True
        self.feed(LifecycleEvent(Kind.EXITED, self.now, exit=exit_))

    @precondition(lambda self: self.left)
    @rule(chance=st.floats(0, 0.99))
    def cleared(self, chance: float) -> None:
        self.left = False
        self.feed(LifecycleEvent(Kind.CLEARED, self.now, chance))

    @invariant()
    def the_phase_tells_what_is_there(self) -> None:
        assert self.alive == (self.life.phase in LIVE)
        assert self.left == (self.life.phase is Phase.CLEARING)

    @invariant()
    def the_budget_holds(self) -> None:
        assert len(self.life.exits) <= POLICY.max_restarts + 1
        recent = [at for at in self.automatic if self.now - at < POLICY.within_s]
        assert len(recent) <= POLICY.max_restarts

    @invariant()
    def there_is_a_way_out_and_a_way_back(self) -> None:
        stopped = self.until_ended(STOP)
        assert stopped.phase in ENDED
        again, _ = go(stopped, RESUME, START, OK)
        assert again.phase is Phase.READY

    def until_ended(self, *events: LifecycleEvent) -> Life:
        life, _ = go(self.life, *events)
        for _ in range(POLICY.signals + 1):
            life, _ = go(life, GRACE_OVER)
        if life.phase in LIVE:
            life, _ = go(life, exited(KILLED))
        return go(life, CLEARED)[0]


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.lists(st.floats(0, 30), min_size=12, max_size=12), st.floats(0, 0.99))
def test_whatever_the_rhythm_of_crashes_the_budget_ends_it_or_time_forgives(waits: list[float], chance: float) -> None:
    life, now, starts = Life(), 0.0, []
    for wait in waits:
        if life.phase is Phase.FAILED:
            break
        starts.append(now)
        life, _ = go(life, START, OK)
        now += wait
        life, _ = go(life, exited(), LifecycleEvent(Kind.CLEARED, now, chance))
    for at in starts:
        assert sum(at <= other < at + POLICY.within_s for other in starts) <= POLICY.max_restarts + 2
