"""Admission: decides which requests are sent to engines now, which wait, and which are refused. Pure: the caller
passes the times, and nothing is awaited here.

A request has one sequence or several: for `n`, or for a list of prompts. A sequence is admitted if there is a free seat
and its predicted TTFT is within the target. Otherwise it waits in a bounded queue that is fair to API keys (see
`FairQueue`). A request that would wait too long is refused at once, with a time for Retry-After. If the queue is full,
a key with fewer waiting requests takes the place of the newest request of the key with most.

While several keys are active, their order is kept up to the engines: no key gets more than its share of the seats once
seven eighths of them are taken, and a key that had its share sends another prompt only if the engines would run out of
prompts. What waits inside an engine is out of reach for the order here.

The number of seats is the number of sequences that the engines run concurrently. With `by_slo`, a limit also follows
the measured TPOT: it decreases when a stream comes close to the target, and increases while streams are well below it
(additive increase, multiplicative decrease: Chiu and Jain, 1989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.shares.fair_queue import FairQueue, KeyState, Waiter, Work
from pdctl.proxy.shares.rules import KeyRules

# Seats of an engine that does not report a number: high enough never to limit.
_UNKNOWN = 1 << 20
# Sequences sent per seat. The excess waits in the engines, so the next one is there when a seat becomes free.
_SLACK = 1.25
_DECREASE = 0.9
# Fractions of the TPOT target: the limit decreases above _HIGH and increases below _CALM. A controller that steers to
# the target itself would miss it half of the time. _MARGIN is the same for predictions of the TTFT.
_HIGH, _CALM, _MARGIN = 0.8, 0.65, 0.7
# Minimum time between two decreases, seconds: the effect of one must be measured before the next.
_DECREASE_PAUSE_S = 1.0
_LONGEST_RETRY_S = 60
# Longest wait in the queue if no TTFT target is enforced, seconds. If one is enforced: the fraction of it.
_PATIENCE_S, _TTFT_PART = 60.0, 0.7
# A key counts as active for so long after its last request, seconds.
_ACTIVE_S = 300.0
# The fraction of the seats that is kept for keys with less than their share, while several keys are active.
_RESERVED = 1 / 8
# Prompts that a prefill engine may have at once, however long they are: one that it computes and the next.
_PROMPTS_EACH = 2


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request is refused for now. `retry_after_s`: whole seconds."""

    reason: str
    retry_after_s: int


@dataclass(slots=True)
class Admission:
    """The admission state of one proxy worker. `patience_s`: longest wait in the queue."""

    max_queue: int
    patience_s: float
    ttft_s: float
    tpot_s: float
    by_slo: bool
    running: int = 0
    limit: float = float(_UNKNOWN)
    done_per_s: float = 0.0
    queue: FairQueue = field(default_factory=FairQueue)
    _pushed_out: list[Waiter] = field(default_factory=list)
    _decreased_at: float = -math.inf
    _done: int = 0
    _done_since: float = 0.0

    @classmethod
    def of(cls, name: str, max_queue: int, ttft_s: float, tpot_s: float, rules: KeyRules | None = None) -> Admission:
        """The admission that a topology names, "queue" or "slo". `rules`: of its API keys."""
        by_slo = name == "slo"
        patience_s = _TTFT_PART * ttft_s if by_slo else _PATIENCE_S
        return cls(max_queue, patience_s, ttft_s, tpot_s, by_slo, queue=FairQueue(rules))

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self.queue.requests

    @property
    def has_waiters(self) -> bool:
        """Whether a sequence waits for a seat."""
        return self.queue.waiting > 0

    def follow(self, rules: Admission) -> None:
        """Apply other rules. Running and waiting sequences are kept."""
        self.max_queue, self.patience_s = rules.max_queue, rules.patience_s
        self.ttft_s, self.tpot_s = rules.ttft_s, rules.tpot_s
        self.queue.follow(rules.queue.rules)
        if rules.by_slo != self.by_slo:
            self.by_slo, self.limit = rules.by_slo, float(_UNKNOWN)

    def ask(
        self,
        name: str,
        priority: int,
        outlook: Outlook,
        now: float,
        max_tokens: int | None = None,
        is_more: bool = False,
    ) -> Waiter | Refusal:
        """Ask for a seat for a request's first sequence, or for a further one. `name`: of its key.

        Returns a waiter that is granted at once or waits, or a refusal. The caller then takes `pushed_out`.
        """
        key = self.queue.asks(name, now)
        if not is_more and (refusal := self._hopeless(outlook)) is not None:
            return refusal
        waiter = Waiter(name, priority, now, self.queue.predict(key, outlook.tokens, max_tokens), is_more)
        if self._may(name, key, outlook, now) and (not self.queue.waiting or self._next(outlook, now) is None):
            self.running += 1
            self.queue.grant(waiter)
            return waiter
        if not is_more and (refusal := self._crowded(key, outlook)) is not None:
            return refusal
        self.queue.push(waiter)
        return waiter

    def _hopeless(self, outlook: Outlook) -> Refusal | None:
        bound_s = _MARGIN * self.ttft_s
        if self.by_slo and outlook.ttft_s > bound_s:
            return Refusal("ttft", _seconds(outlook.ttft_s - bound_s))
        return None

    def _crowded(self, key: KeyState, outlook: Outlook) -> Refusal | None:
        """Why a request may not wait. If it may, it may have pushed another one out."""
        bound_s = _MARGIN * self.ttft_s
        if self.by_slo and self._queue_s(key) + outlook.ttft_s > bound_s:
            return Refusal("wait", _seconds(self._queue_s(key) + outlook.ttft_s - bound_s))
        if self.waiting < self.max_queue:
            return None
        out = self.queue.last_of_longest(key)
        if out is None:
            return Refusal("queue", _seconds(self._queue_s(key)))
        self.queue.remove(out)
        out.pushed_out = True
        self._pushed_out.append(out)
        return None

    def take_pushed_out(self) -> list[tuple[Waiter, Refusal]]:
        """Requests that had to leave the queue for others; each is returned once."""
        found, self._pushed_out = self._pushed_out, []
        return [(waiter, Refusal("queue", _seconds(self._queue_s(self.queue.state(waiter.key))))) for waiter in found]

    def next(self, outlook: Outlook, now: float = 0.0) -> Waiter | None:
        """Grant a free seat to the next waiter, and return it; None if no seat is free or no sequence waits."""
        waiter = self._next(outlook, now)
        if waiter is not None:
            self.queue.remove(waiter)
            self.running += 1
            self.queue.grant(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter that gave up or timed out."""
        if not waiter.granted and not waiter.pushed_out:
            self.queue.remove(waiter)

    def prefilled(self, waiter: Waiter) -> None:
        """A granted sequence has its first token."""
        self.queue.prefilled(waiter)

    def done(self, waiter: Waiter, now: float, tpot_s: float | None, actual: Work | None = None) -> None:
        """A granted sequence has ended. `tpot_s`: None if it was not answered. `actual`: its work, None for as
        predicted."""
        self.running -= 1
        self.queue.settle(waiter, waiter.work if actual is None else actual, tpot_s is not None)
        self._pace(now)
        if tpot_s is not None:
            self.measured(now, tpot_s)

    def measured(self, now: float, tpot_s: float) -> None:
        """Adapt the limit to the TPOT of an answer, seconds."""
        if not self.by_slo:
            return
        if tpot_s > _HIGH * self.tpot_s:
            if now - self._decreased_at > _DECREASE_PAUSE_S:
                self._decreased_at = now
                self.limit = max(1.0, _DECREASE * min(self.limit, self.running + 1))
        elif tpot_s < _CALM * self.tpot_s and self.running + 1 >= self.limit - 1:
            self.limit = min(float(_UNKNOWN), self.limit + 1 / max(1.0, self.limit))

    def _may(self, name: str, key: KeyState, outlook: Outlook, now: float) -> bool:
        """Whether this key may have another seat now."""
        if self.running >= self.seats(outlook) or not (outlook.kv_room or not self.running):
            return False
        queue = self.queue
        if now - queue.others_asked_at(name) >= _ACTIVE_S:
            return True
        has_prompts = queue.prompts >= _PROMPTS_EACH * outlook.prefills and queue.prompt_tokens >= outlook.prompts
        if outlook.prefills and has_prompts and queue.has_its_share(key):
            return False
        if outlook.seats is None or outlook.seats < 2:
            return True
        common = outlook.seats - math.ceil(_RESERVED * outlook.seats)
        weight = queue.weight + (key.settings.weight if key.is_idle else 0.0)
        return self.running < common or key.running + 1 <= max(1.0, common * key.settings.weight / weight)

    def _next(self, outlook: Outlook, now: float) -> Waiter | None:
        """The next waiter that may get a seat."""
        if not self.queue.waiting or self.running >= self.seats(outlook):
            return None
        for key in self.queue.in_order():
            waiter = self.queue.head(key)
            if self._may(waiter.key, key, outlook, now):
                return waiter
        return None

    def seats(self, outlook: Outlook) -> int:
        """The maximum number of sequences at the engines."""
        said = _UNKNOWN if outlook.seats is None else math.ceil(outlook.seats * _SLACK)
        return max(1, min(said, int(self.limit)))

    def audit(self) -> None:
        """Check that counts match the queue, no waiter is queued twice or already granted, and keys own all seats."""
        self.queue.audit()
        assert self.running == sum(key.running for key in self.queue.states().values())
        assert all(waiter.pushed_out and waiter not in self.queue for waiter in self._pushed_out)

    def _queue_s(self, key: KeyState) -> float:
        """How long a new sequence of a key would wait."""
        return (self.queue.ahead(key) + 1) / self.done_per_s if self.done_per_s else 0.0

    def _pace(self, now: float) -> None:
        self._done += 1
        elapsed = now - self._done_since
        if elapsed > 10.0:
            self._done, self._done_since = 1, now
        elif elapsed >= 1.0:
            self.done_per_s = (
                0.5 * (self.done_per_s + self._done / elapsed) if self.done_per_s else self._done / elapsed
            )
            self._done, self._done_since = 0, now


def _seconds(wait_s: float) -> int:
    return max(1, min(_LONGEST_RETRY_S, math.ceil(wait_s)))
