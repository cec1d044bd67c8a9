"""Which prefill and which decode engine a request gets: pure functions over a snapshot of the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_PREFILLS = ("prefill", "hybrid")
_DECODES = ("decode", "hybrid")


@dataclass(frozen=True, slots=True)
class View:
    """One engine at the moment of choosing. See proxy.pool.Engine for the units."""

    name: str
    role: str
    healthy: bool
    pending: float
    speed: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Engine names. The same name twice means that one engine does it all, and no KV moves."""

    prefill: str
    decode: str

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill == self.decode


# (candidates, amount of new work, count of requests so far) -> the chosen one.
Policy = Callable[[Sequence[View], float, int], View]


def round_robin(candidates: Sequence[View], _: float, turn: int) -> View:
    """Each in turn."""
    return candidates[turn % len(candidates)]


def min_expected_latency(candidates: Sequence[View], amount: float, turn: int) -> View:
    """The one that would be done first: (pending + new work) / speed.

    An engine never measured counts as as fast as the fastest known. Equals take turns.
    """
    fastest = max((view.speed for view in candidates), default=0.0) or 1.0

    def expected(view: View) -> float:
        return (view.pending + amount) / (view.speed or fastest)

    best = min(expected(view) for view in candidates)
    # Within a tenth of the best there is nothing to choose but noise.
    return round_robin([view for view in candidates if expected(view) <= best * 1.1], amount, turn)


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "min_expected_latency": min_expected_latency}


def choose(
    policy: Policy, views: Sequence[View], amount: float, turn: int, avoid: frozenset[str] = frozenset()
) -> Choice | None:
    """A pair for a request of `amount` bytes of prompt; None when no engine is healthy.

    `avoid` names engines that just failed this request: they are taken only if there is no other. Without both
    roles, one engine of whatever role does prefill and decode by itself.
    """
    healthy = [view for view in views if view.healthy]
    fresh = [view for view in healthy if view.name not in avoid] or healthy
    prefills = [view for view in fresh if view.role in _PREFILLS]
    decodes = [view for view in fresh if view.role in _DECODES]
    hybrids = [view for view in fresh if view.role == "hybrid"]
    if not fresh:
        return None
    if not prefills or not decodes or len(hybrids) == len(fresh):
        one = policy(hybrids or fresh, amount, turn).name
        return Choice(one, one)
    return Choice(policy(prefills, amount, turn).name, policy(decodes, 1.0, turn).name)
