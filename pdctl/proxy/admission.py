"""Who may go on to the engines now, who waits, who is refused. Pure books: times are given, nothing is awaited here.

A request is admitted while there are seats, and while the time to its first token is predicted to be within the target.
Otherwise it waits in a bounded queue: lower `priority` first, then API keys in turn, so that one key's flood does not
delay another's single request. Whoever would wait too long is refused at once, with the time after which it is worth
coming back.

Seats are what engines say they run at once. With `by_slo` the number also follows what was measured: one less than it
was when a stream missed the target for the time per token, one more when all is well (additive increase, multiplicative
decrease: Chiu and Jain, 1989).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

# Seats of an engine that does not say how many it has: none that would ever limit.
_UNKNOWN = 1 << 20
# Requests sent on beyond the engines' seats, as a part: the next one is there when a seat comes free.
_SLACK = 1.25
_DECREASE = 0.9
# Seats are taken away above this part of the target for the time per token, and given back below that: what is steered
# to the target itself misses it half of the time. Predictions of the first token have the same margin.
_HIGH, _CALM, _MARGIN = 0.8, 0.65, 0.7
# Between two decreases, seconds: the effect of one must be seen before the next.
_DECREASE_PAUSE_S = 1.0
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Outlook:
    """The pool at this moment. `seats`: None when no engine says. `ttft_s`: predicted for this request, 0 if unknown.

    `kv_room`: whether its KV would fit somewhere.
    """

    seats: int | None
    ttft_s: float
    kv_room: bool = True


@dataclass(slots=True, eq=False)
class Waiter:
    """One request in the queue. The shell sets `granted` aside and wakes it."""

    key: str
    priority: int
    since: float
    granted: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not now. `retry_after_s`: whole seconds."""

    reason: str
    retry_after_s: int


@dataclass(slots=True)
class Admission:
    """The books of one proxy worker. `patience_s`: longest wait in the queue."""

    max_queue: int
    patience_s: float
    ttft_s: float
    tpot_s: float
    by_slo: bool
    running: int = 0
    limit: float = float(_UNKNOWN)
    done_per_s: float = 0.0
    _queues: dict[int, dict[str, deque[Waiter]]] = field(default_factory=dict)
    _waiting: int = 0
    _decreased_at: float = -math.inf
    _done: int = 0
    _done_since: float = 0.0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    def follow(self, rules: Admission) -> None:
        """Take on other rules; who runs and who waits stays."""
        self.max_queue, self.patience_s = rules.max_queue, rules.patience_s
        self.ttft_s, self.tpot_s = rules.ttft_s, rules.tpot_s
        if rules.by_slo != self.by_slo:
            self.by_slo, self.limit = rules.by_slo, float(_UNKNOWN)

    def ask(self, key: str, priority: int, outlook: Outlook, now: float) -> Waiter | Refusal:
        """A new request: a waiter that is granted at once, one that waits, or a refusal."""
        waiter = Waiter(key, priority, now)
        bound_s = _MARGIN * self.ttft_s
        if self.by_slo and outlook.ttft_s > bound_s:
            return Refusal("ttft", _seconds(outlook.ttft_s - bound_s))
        if not self._waiting and self.running < self.seats(outlook) and (outlook.kv_room or not self.running):
            self.running += 1
            waiter.granted = True
            return waiter
        if self._waiting >= self.max_queue:
            return Refusal("queue", _seconds(self._queue_s()))
        if self.by_slo and self._queue_s() + outlook.ttft_s > bound_s:
            return Refusal("wait", _seconds(self._queue_s() + outlook.ttft_s - bound_s))
        self._queues.setdefault(priority, {}).setdefault(key, deque()).append(waiter)
        self._waiting += 1
        return waiter

    def next(self, outlook: Outlook) -> Waiter | None:
        """Grant a seat to whoever is next, if there is one and somebody waits."""
        if not self._waiting or self.running >= self.seats(outlook) or not (outlook.kv_room or not self.running):
            return None
        priority = min(self._queues)
        keys = self._queues[priority]
        key = next(iter(keys))
        waiter = keys[key].popleft()
        # To the end of the round: every other key comes before this one again.
        queue = keys.pop(key)
        if queue:
            keys[key] = queue
        if not keys:
            del self._queues[priority]
        self._waiting -= 1
        self.running += 1
        waiter.granted = True
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """A waiter gave up, or its patience is over."""
        if waiter.granted:
            return
        keys = self._queues[waiter.priority]
        keys[waiter.key].remove(waiter)
        if not keys[waiter.key]:
            del keys[waiter.key]
        if not keys:
            del self._queues[waiter.priority]
        self._waiting -= 1

    def done(self, now: float, tpot_s: float | None) -> None:
        """A granted request has ended; `tpot_s` if it was answered."""
        self.running -= 1
        self._pace(now)
        if not self.by_slo or tpot_s is None:
            return
        if tpot_s > _HIGH * self.tpot_s:
            if now - self._decreased_at > _DECREASE_PAUSE_S:
                self._decreased_at = now
                self.limit = max(1.0, _DECREASE * min(self.limit, self.running + 1))
        elif tpot_s < _CALM * self.tpot_s and self.running + 1 >= self.limit - 1:
            self.limit = min(float(_UNKNOWN), self.limit + 1 / max(1.0, self.limit))

    def seats(self, outlook: Outlook) -> int:
        """Requests that may be at the engines together."""
        said = _UNKNOWN if outlook.seats is None else math.ceil(outlook.seats * _SLACK)
        return max(1, min(said, int(self.limit)))

    def audit(self) -> None:
        """The queue's count is its content; nobody waits twice or is both waiting and granted."""
        waiters = [waiter for keys in self._queues.values() for queue in keys.values() for waiter in queue]
        assert len(waiters) == self._waiting == len(set(map(id, waiters)))
        assert not any(waiter.granted for waiter in waiters)
        assert all(queue for keys in self._queues.values() for queue in keys.values())
        assert self.running >= 0

    def _queue_s(self) -> float:
        """How long a newcomer would wait."""
        return (self._waiting + 1) / self.done_per_s if self.done_per_s else 0.0

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
