"""Circuit breaker and retry budget. Pure: no clock, no I/O; times are monotonic seconds."""

from __future__ import annotations

from dataclasses import dataclass

# Consecutive failures that open the circuit; how long it stays open at first and at most, seconds.
_THRESHOLD = 4
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class Breaker:
    """A circuit breaker (Nygard, Release It!): closed, open for a while, then one trial at a time.

    A trial that fails opens it for twice as long; one success closes it.
    """

    failures: int = 0
    opened_at: float | None = None
    pause_s: float = _FIRST_PAUSE_S
    trial_at: float | None = None

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        if self.opened_at is None:
            return True
        if now - self.opened_at < self.pause_s:
            return False
        # A trial without a reported end must not keep the circuit open forever.
        return self.trial_at is None or now - self.trial_at >= _LONGEST_PAUSE_S

    def started(self, now: float) -> None:
        """A request was sent; if the circuit is open, it is the trial."""
        if self.opened_at is not None:
            self.trial_at = now

    def succeeded(self) -> None:
        """A request was answered."""
        self.failures = 0
        if self.opened_at is not None:
            self.reset()

    def failed(self, now: float, sure: bool = False) -> None:
        """A request failed because of the engine. `sure`: it is known to be stuck; then one failure is enough."""
        self.failures += 1
        if self.trial_at is not None:
            self.pause_s = min(_LONGEST_PAUSE_S, self.pause_s * 2)
        elif not sure and self.failures < _THRESHOLD:
            return
        self.opened_at, self.trial_at = now, None

    def abandoned(self) -> None:
        """A request ended without a result, for example because its client disconnected."""
        self.trial_at = None

    def reset(self) -> None:
        """The engine was restarted: close the circuit."""
        self.failures, self.opened_at, self.trial_at, self.pause_s = 0, None, None, _FIRST_PAUSE_S

    @property
    def state(self) -> str:
        """closed, open or half_open."""
        if self.opened_at is None:
            return "closed"
        return "open" if self.trial_at is None else "half_open"


@dataclass(slots=True)
class RetryBudget:
    """A token bucket for the retries of all requests.

    Retries beyond the budget wait instead of failing, so that a storm of retries is spread out without client errors.
    """

    capacity: float = 64.0
    per_s: float = 20.0
    per_request: float = 0.2
    tokens: float = 64.0
    at: float = 0.0

    def request(self) -> None:
        """A new request was accepted: it adds a fraction of a retry."""
        self.tokens = min(self.capacity, self.tokens + self.per_request)

    def wait_s(self, now: float) -> float:
        """Take one retry; returns how long it must wait before it starts."""
        elapsed = max(0.0, now - self.at)
        self.tokens, self.at = min(self.capacity, self.tokens + elapsed * self.per_s) - 1, now
        return max(0.0, -self.tokens / self.per_s)
