"""Which prefill and which decode engine a request gets: pure functions over a snapshot of the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_PREFILLS = ("prefill", "hybrid")
_DECODES = ("decode", "hybrid")


class Load(NamedTuple):
    """Work pending, and work per second as measured; 0 until something was."""

    pending: float
    speed: float


class View(NamedTuple):
    """One engine at the moment of choosing. See proxy.pool.Engine for the units."""

    name: str
    role: str
    healthy: bool
    prompts: Load
    streams: Load


@dataclass(frozen=True, slots=True)
class Choice:
    """Engine names. The same name twice means that one engine does it all, and no KV moves."""

    prefill: str
    decode: str

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill == self.decode


# (loads of the candidates, amount of new work, count of requests so far) -> index of the chosen one.
Policy = Callable[[Sequence[Load], float, int], int]


def round_robin(candidates: Sequence[Load], _: float, turn: int) -> int:
    """Each in turn."""
    return turn % len(candidates)


def min_expected_latency(candidates: Sequence[Load], amount: float, turn: int) -> int:
    """The one that would be done first: (pending + new work) / speed.

    An engine never measured counts as as fast as the fastest known. Equals take turns.
    """
    fastest = max(load.speed for load in candidates) or 1.0
    expected = [(load.pending + amount) / (load.speed or fastest) for load in candidates]
    # Within a tenth of the best there is nothing to choose but noise.
    good = [index for index, seconds in enumerate(expected) if seconds <= min(expected) * 1.1]
    return good[turn % len(good)]


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
        able = hybrids or fresh
        one = able[policy([view.prompts for view in able], amount, turn)].name
        return Choice(one, one)
    prefill = prefills[policy([view.prompts for view in prefills], amount, turn)]
    decode = decodes[policy([view.streams for view in decodes], 1.0, turn)]
    return Choice(prefill.name, decode.name)
