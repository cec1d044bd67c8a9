"""Decisions after failures of a request, for all possible sequences of failures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from pdctl.net.openai.answers import EngineError
from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.proxy.request.failover import (
    Cause,
    ComputeAlone,
    Decision,
    FailoverPolicy,
    Failure,
    GiveUp,
    RetryElsewhere,
    Tries,
    classify,
    decide,
)

POLICY = FailoverPolicy()
SMALL = replace(POLICY, max_failures=3, max_failures_in_all=6, max_lost=2)


@dataclass(frozen=True)
class Step:
    """A failure after `tokens` new tokens and `seconds`."""

    cause: Cause
    tokens: int = 0
    seconds: float = 0.1
    engine: str = "d0"


def run(steps: list[Step], policy: FailoverPolicy = POLICY) -> list[tuple[Step, Tries, Decision]]:
    """Every step until the request is given up."""
    tries, emitted, now, budget, found = Tries(progress_at=0.0), 0, 0.0, RetryBudget(), []
    for step in steps:
        emitted, now = emitted + step.tokens, now + step.seconds
        failure = Failure(step.engine, step.cause, "it broke", 418, "teapot", "spout")
        tries, decision = decide(tries, failure, emitted, now, budget, 0.5, policy)
        tries.audit()
        found.append((step, tries, decision))
        if isinstance(decision, GiveUp):
            break
    return found


STEPS = st.builds(
    Step, st.sampled_from(list(Cause)), st.integers(0, 40), st.floats(0.0, 200.0), st.sampled_from(["p0", "d0", "d1"])
)


def check(found: list[tuple[Step, Tries, Decision]], policy: FailoverPolicy) -> None:
    """Check the rules that hold for every sequence."""
    lost = failures = 0
    for number, (step, tries, decision) in enumerate(found, 1):
        if step.cause is Cause.REFUSED:
            assert decision == GiveUp(418, "it broke", "teapot", "spout"), "the client gets the engine's own error"
            continue
        failures = (0 if step.tokens > 1 else failures) + (step.cause is Cause.BROKE)
        lost += step.cause is Cause.KV_LOST
        assert tries.failures_in_all == number
        assert tries.lost == lost
        assert failures <= policy.max_failures
        if isinstance(decision, GiveUp):
            assert decision.status == 502
            assert step.engine in decision.message
            assert failures >= policy.max_failures or number >= policy.max_failures_in_all or step.seconds > 0
            continue
        assert failures < policy.max_failures
        assert number < policy.max_failures_in_all
        assert isinstance(decision, ComputeAlone if lost >= policy.max_lost else RetryElsewhere)
        assert tries.avoid == (frozenset() if step.cause is Cause.KV_LOST else frozenset({step.engine}))
        assert decision.progressed == (step.tokens > 1)
        assert decision.after_s >= 0


def test_every_short_sequence_of_failures() -> None:
    kinds = [Step(cause, tokens) for cause, tokens in product(Cause, (0, 1, 5))]
    for length in range(1, 5):
        for steps in product(kinds, repeat=length):
            check(run(list(steps), SMALL), SMALL)


@given(st.lists(STEPS, max_size=150))
def test_any_sequence_of_failures(steps: list[Step]) -> None:
    found = run(steps)
    check(found, POLICY)
    assert len(found) <= POLICY.max_failures_in_all
    if len(found) < len(steps):
        assert isinstance(found[-1][2], GiveUp)


def test_a_request_that_kills_engine_after_engine_is_given_up() -> None:
    # Prefill's token arrives each time; it is not progress.
    found = run([Step(Cause.BROKE, tokens=1)] * 50)
    assert len(found) == POLICY.max_failures


def test_progress_makes_good_for_failures() -> None:
    found = run([Step(Cause.BROKE, tokens=2)] * 90)
    assert len(found) == 90
    assert all(isinstance(decision, RetryElsewhere) for _, _, decision in found)


def test_engines_that_cannot_be_reached_do_not_count_against_the_request() -> None:
    assert len(run([Step(Cause.NOT_REACHED, seconds=0.01)] * 90)) == 90


def test_no_progress_for_too_long_ends_it() -> None:
    found = run([Step(Cause.NOT_REACHED, seconds=POLICY.no_progress_s / 4)] * 10)
    assert len(found) == 5
    assert isinstance(found[-1][2], GiveUp)


def test_hand_overs_that_are_lost_again_and_again_are_not_tried_for_ever() -> None:
    decisions = [decision for _, _, decision in run([Step(Cause.KV_LOST)] * 4)]
    assert [type(decision) for decision in decisions] == [RetryElsewhere, ComputeAlone, ComputeAlone, ComputeAlone]


def test_backoff_grows_and_the_budget_spreads_a_storm() -> None:
    waits = [d.after_s for _, _, d in run([Step(Cause.BROKE)] * 7) if not isinstance(d, GiveUp)]
    assert waits == sorted(waits)
    assert waits[-1] <= POLICY.longest_backoff_s
    empty = RetryBudget(tokens=0.0)
    _, decision = decide(Tries(0.0), Failure("d0", Cause.BROKE, "x"), 0, 0.0, empty, 0.0, POLICY)
    assert isinstance(decision, RetryElsewhere)
    assert decision.after_s == 1 / empty.per_s, "it waits until the budget allows a retry again"


def test_what_an_answer_means() -> None:
    def cause(status: int, kv_lost: bool = False, resumable: bool = True) -> Cause:
        return classify("d0", POLICY, EngineError(status, "m", "k", kv_lost), resumable).cause

    assert cause(503) is Cause.BROKE
    assert cause(409, kv_lost=True) is Cause.KV_LOST
    assert cause(400) is Cause.REFUSED
    assert cause(502, resumable=False) is Cause.REFUSED


def test_patience_follows_the_queue_within_bounds() -> None:
    assert POLICY.patience_s(None) == POLICY.prefill_s
    assert POLICY.patience_s(0.001) == POLICY.least_patience_s
    assert POLICY.patience_s(4.0) == 40.0
    assert POLICY.patience_s(1e9) == POLICY.prefill_s
