"""Decides what happens to a request after a call to an engine failed. Pure: no I/O, no clock, no random numbers.

The caller keeps the tokens that the client has. `decide` returns whether the request is retried elsewhere, computed by
one engine alone, or given up, and with which error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from pdctl.net.openai.answers import EngineError
from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.wire import ROLE_CHANGED


@dataclass(frozen=True, slots=True)
class FailoverPolicy:
    """Limits for one request. Times in seconds.

    `max_failures`: engine failures without a new token between them; `max_failures_in_all`: failures of any kind;
    `max_lost`: lost hand-overs before one engine computes the request alone; `no_progress_s`: time since the last new
    token. `wait_for_engine_s`: wait while no engine is usable; `prefill_s`, `first_token_s`, `stall_s`: wait for a
    silent engine before its answer, before its first token and between tokens. A prefill that takes `times_expected`
    times as long as its queue predicts is given up, but not before `least_patience_s`, or `least_together_s` if it also
    waits for the decode engine. `retryable`: HTTP statuses after
    which another try may succeed.
    """

    max_failures: int = 8
    max_failures_in_all: int = 100
    max_lost: int = 2
    no_progress_s: float = 300.0
    wait_for_engine_s: float = 60.0
    prefill_s: float = 600.0
    first_token_s: float = 300.0
    stall_s: float = 120.0
    times_expected: float = 10.0
    least_patience_s: float = 20.0
    least_together_s: float = 30.0
    backoff_s: float = 0.02
    longest_backoff_s: float = 1.0
    retryable: frozenset[int] = frozenset({409, 429, 500, 502, 503, 504})

    def patience_s(self, expected_s: float | None, together: bool = False) -> float:
        """How long a prefill may take if it is expected to take `expected_s` (None: unknown). `together`: it ends only
        when the decode engine, which was called at the same time, has its KV."""
        if expected_s is None:
            return self.prefill_s
        least = self.least_together_s if together else self.least_patience_s
        return min(self.prefill_s, max(least, self.times_expected * expected_s))


class Cause(Enum):
    """What a failed call means for the engine and the request."""

    NOT_REACHED = "the request did not reach the engine"
    BROKE = "the engine failed while it had the request"
    KV_LOST = "the KV of the hand-over was lost, but no engine failed"
    REFUSED = "the engine refuses the request, and another one would too"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call. `status`, `kind` and `param`: the error for the client if the engine refuses the request."""

    engine: str
    cause: Cause
    reason: str
    status: int = 502
    kind: str = "server_error"
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Tries:
    """The history of a request. `progress_at`: when it last got a token, seconds on the caller's clock.

    `avoid`: engines that the next try must not use; `emitted`: tokens that the client had at the last failure.
    """

    progress_at: float
    failures: int = 0
    failures_in_all: int = 0
    lost: int = 0
    emitted: int = 0
    avoid: frozenset[str] = frozenset()

    def audit(self) -> None:
        """Raises AssertionError if the counts are inconsistent."""
        assert 0 <= self.failures <= self.failures_in_all
        assert 0 <= self.lost <= self.failures_in_all
        assert len(self.avoid) <= 1


@dataclass(frozen=True, slots=True)
class RetryElsewhere:
    """Prefill again and continue, after `after_s`. `progressed`: it got tokens since its last failure."""

    after_s: float
    progressed: bool


@dataclass(frozen=True, slots=True)
class ComputeAlone:
    """The same, but on one engine alone: too many hand-overs of this request were lost."""

    after_s: float
    progressed: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Answer the client with this error."""

    status: int
    message: str
    kind: str
    param: str | None = None


Decision = RetryElsewhere | ComputeAlone | GiveUp


def classify(engine: str, policy: FailoverPolicy, error: EngineError, resumable: bool) -> Failure:
    """Classify an engine's error answer. `resumable`: False if its kind cannot continue the request."""
    if error.kind == ROLE_CHANGED:
        return Failure(engine, Cause.NOT_REACHED, error.message)
    if error.status not in policy.retryable or not resumable:
        return Failure(engine, Cause.REFUSED, error.message, error.status, error.kind, error.param)
    return Failure(engine, Cause.KV_LOST if error.kv_lost else Cause.BROKE, error.message)


def decide(
    tries: Tries,
    failure: Failure,
    emitted: int,
    now: float,
    budget: RetryBudget,
    chance: float,
    policy: FailoverPolicy,
) -> tuple[Tries, Decision]:
    """Returns the request's new history and the decision. `emitted`: tokens that the client has; `chance`: jitter, in
    [0, 1).

    A retry is taken from the budget, and waits until the budget allows it.
    """
    if failure.cause is Cause.REFUSED:
        return tries, GiveUp(failure.status, failure.reason, failure.kind, failure.param)
    # One token is no progress: prefill alone produces one, even for a request that kills every decode engine.
    progressed = emitted > tries.emitted + 1
    lost = failure.cause is Cause.KV_LOST
    tries = replace(
        tries,
        progress_at=now if progressed else tries.progress_at,
        failures=(0 if progressed else tries.failures) + (failure.cause is Cause.BROKE),
        failures_in_all=tries.failures_in_all + 1,
        lost=tries.lost + lost,
        emitted=emitted,
        avoid=frozenset() if lost else frozenset({failure.engine}),
    )
    late = now - tries.progress_at > policy.no_progress_s
    if late or tries.failures >= policy.max_failures or tries.failures_in_all >= policy.max_failures_in_all:
        times = tries.failures_in_all
        message = f"the request failed {times} times, last on {failure.engine}: {failure.reason}"
        return tries, GiveUp(502, message, "server_error")
    backoff = min(policy.longest_backoff_s, policy.backoff_s * 2 ** min(tries.failures + 1, 10)) * chance
    after_s = backoff + budget.wait_s(now)
    action = ComputeAlone if tries.lost >= policy.max_lost else RetryElsewhere
    return tries, action(after_s, progressed)
