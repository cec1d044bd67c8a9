"""Admission: decides which requests are sent to engines now, which wait, and which are refused. Pure: the caller
passes the times, and nothing is awaited here.

A request has one sequence or several: for `n`, or for a list of prompts. A sequence is admitted if there is a free seat
and its predicted TTFT is within the target. Otherwise it waits in a bounded queue: lower `priority` first, then the API
key that has received least so far, counted in sequences and prompt bytes (start-time fair queueing: Goyal, Vin and
Cheng, 1996). While other keys are active, no key gets the last eighth of the seats. One key's flood then does not delay
another key's single request. A request that would wait too long is refused at once, with a time for Retry-After.

The number of seats is the number of sequences that the engines run concurrently. With `by_slo`, a limit also follows
the measured TPOT: it decreases when a stream comes close to the target, and increases while streams are well below it
(additive increase, multiplicative decrease: Chiu and Jain, 1989).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from pdctl.proxy.engines.outlook import Outlook

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
# A key counts as active for _ACTIVE_S seconds after its last request. At most _MAX_KEYS keys are kept.
_ACTIVE_S, _MAX_KEYS = 30.0, 4096
# The fraction of the seats that one key cannot get while other keys are active.
_RESERVED = 1 / 8
# Prompt bytes that cost as much as one sequence.
_BYTES_PER_COST = 4096.0


@dataclass(slots=True, eq=False)
class Waiter:
    """One sequence in the queue. The caller wakes it when `granted` is set.

    `is_more`: a further sequence of a request that was admitted. `size`: bytes of its prompt.
    """

    key: str
    priority: int
    since: float
    granted: bool = False
    is_more: bool = False
    size: float = 0.0

    @property
    def cost(self) -> float:
        """Its cost for its key."""
        return 1.0 + self.size / _BYTES_PER_COST


@dataclass(slots=True)
class _Key:
    """The state of one API key: sequences at the engines, cost of all that it was granted, time of its last request."""

    running: int = 0
    given: float = 0.0
    asked_at: float = -math.inf


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
    _queues: dict[int, dict[str, deque[Waiter]]] = field(default_factory=dict)
    _keys: dict[str, _Key] = field(default_factory=dict)
    _given: float = 0.0
    _waiting: int = 0
    _more: int = 0
    _decreased_at: float = -math.inf
    _done: int = 0
    _done_since: float = 0.0

    @classmethod
    def of(cls, name: str, max_queue: int, ttft_s: float, tpot_s: float) -> Admission:
        """The admission that a topology names, "queue" or "slo"."""
        by_slo = name == "slo"
        return cls(max_queue, _TTFT_PART * ttft_s if by_slo else _PATIENCE_S, ttft_s, tpot_s, by_slo)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    @property
    def has_waiters(self) -> bool:
        """Whether a sequence waits for a seat."""
        return bool(self._queues)

    def follow(self, rules: Admission) -> None:
        """Apply other rules. Running and waiting sequences are kept."""
        self.max_queue, self.patience_s = rules.max_queue, rules.patience_s
        self.ttft_s, self.tpot_s = rules.ttft_s, rules.tpot_s
        if rules.by_slo != self.by_slo:
            self.by_slo, self.limit = rules.by_slo, float(_UNKNOWN)

    def ask(
        self, key: str, priority: int, outlook: Outlook, now: float, size: float = 0.0, is_more: bool = False
    ) -> Waiter | Refusal:
        """Ask for a seat for a request's first sequence, or for a further one.

        Returns a waiter that is granted at once or waits, or a refusal.
        """
        waiter = Waiter(key, priority, now, is_more=is_more, size=size)
        known = self._known(key, now)
        if not is_more and (refusal := self._hopeless(outlook)) is not None:
            return refusal
        if self._next_key(outlook, now) is None and self._may(known, outlook, now):
            self._grant(waiter, known)
            return waiter
        if not is_more and (refusal := self._crowded(outlook)) is not None:
            return refusal
        self._queues.setdefault(priority, {}).setdefault(key, deque()).append(waiter)
        self._count(waiter, 1)
        return waiter

    def _hopeless(self, outlook: Outlook) -> Refusal | None:
        bound_s = _MARGIN * self.ttft_s
        if self.by_slo and outlook.ttft_s > bound_s:
            return Refusal("ttft", _seconds(outlook.ttft_s - bound_s))
        return None

    def _crowded(self, outlook: Outlook) -> Refusal | None:
        bound_s = _MARGIN * self.ttft_s
        if self._waiting >= self.max_queue:
            return Refusal("queue", _seconds(self._queue_s()))
        if self.by_slo and self._queue_s() + outlook.ttft_s > bound_s:
            return Refusal("wait", _seconds(self._queue_s() + outlook.ttft_s - bound_s))
        return None

    def next(self, outlook: Outlook, now: float = 0.0) -> Waiter | None:
        """Grant a free seat to the next waiter, and return it; None if no seat is free or no sequence waits."""
        found = self._next_key(outlook, now)
        if found is None:
            return None
        priority, key = found
        keys = self._queues[priority]
        waiter = keys[key].popleft()
        self._tidy(priority, key)
        self._count(waiter, -1)
        self._grant(waiter, self._known(key, None))
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter that gave up or timed out."""
        if waiter.granted:
            return
        self._queues[waiter.priority][waiter.key].remove(waiter)
        self._tidy(waiter.priority, waiter.key)
        self._count(waiter, -1)

    def done(self, now: float, tpot_s: float | None, key: str = "-") -> None:
        """A granted sequence of `key` has ended. `tpot_s`: None if it was not answered."""
        self.running -= 1
        self._keys[key].running -= 1
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

    # -- keys ----------------------------------------------------------------------------------------------

    def _known(self, key: str, now: float | None) -> _Key:
        """The state of a key. An idle key starts at the level of the others: it cannot save up credit."""
        found = self._keys.get(key)
        if found is None:
            self._forget_idle_keys()
            found = self._keys[key] = _Key()
        if now is not None:
            found.given = max(found.given, self._given)
            found.asked_at = now
        return found

    def _forget_idle_keys(self) -> None:
        if len(self._keys) >= _MAX_KEYS:
            waiting = {key for keys in self._queues.values() for key in keys}
            idle = [name for name, key in self._keys.items() if not key.running and name not in waiting]
            for name in sorted(idle, key=lambda name: self._keys[name].asked_at)[: len(idle) // 2]:
                del self._keys[name]

    def _may(self, key: _Key, outlook: Outlook, now: float) -> bool:
        """Whether this key may have another seat now."""
        if self.running >= self.seats(outlook) or not (outlook.kv_room or not self.running):
            return False
        if outlook.seats is None or outlook.seats < 2:
            return True
        others = any(other is not key and now - other.asked_at < _ACTIVE_S for other in self._keys.values())
        return not others or key.running < outlook.seats - math.ceil(_RESERVED * outlook.seats)

    def _next_key(self, outlook: Outlook, now: float) -> tuple[int, str] | None:
        """(priority, key) of the next waiter that may get a seat."""
        for priority in sorted(self._queues):
            for key in sorted(self._queues[priority], key=lambda name: self._keys[name].given):
                if self._may(self._keys[key], outlook, now):
                    return priority, key
        return None

    def _grant(self, waiter: Waiter, key: _Key) -> None:
        self.running += 1
        key.running += 1
        self._given = max(self._given, key.given)
        key.given += waiter.cost
        waiter.granted = True

    def _count(self, waiter: Waiter, change: int) -> None:
        if waiter.is_more:
            self._more += change
        else:
            self._waiting += change

    def _tidy(self, priority: int, key: str) -> None:
        keys = self._queues[priority]
        if not keys[key]:
            del keys[key]
        if not keys:
            del self._queues[priority]

    def seats(self, outlook: Outlook) -> int:
        """The maximum number of sequences at the engines."""
        said = _UNKNOWN if outlook.seats is None else math.ceil(outlook.seats * _SLACK)
        return max(1, min(said, int(self.limit)))

    def audit(self) -> None:
        """Check that counts match the queue, no waiter is queued twice or already granted, and keys own all seats."""
        waiters = [waiter for keys in self._queues.values() for queue in keys.values() for waiter in queue]
        assert len(set(map(id, waiters))) == len(waiters)
        assert self._more == sum(waiter.is_more for waiter in waiters)
        assert self._waiting == len(waiters) - self._more
        assert not any(waiter.granted for waiter in waiters)
        assert all(queue for keys in self._queues.values() for queue in keys.values())
        assert self.running == sum(key.running for key in self._keys.values())
        assert all(key.running >= 0 for key in self._keys.values())

    def _queue_s(self) -> float:
        """How long a new sequence would wait."""
        return (self._waiting + self._more + 1) / self.done_per_s if self.done_per_s else 0.0

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
