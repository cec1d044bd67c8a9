"""Which prefill and which decode engine a request gets: pure functions over a snapshot of the pool.

A policy sees every pair that could serve the request and picks one; both halves are chosen together. An engine paired
with itself does it all inline, and no KV moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_PREFILLS = ("prefill", "hybrid")
_DECODES = ("decode", "hybrid")
# Within a tenth of the best there is nothing to choose but noise: equals take turns.
_EQUAL = 1.1
# An engine with fewer samples than this in its recent window is explored before it is judged, and looked at again
# every so many requests.
_MIN_SAMPLES = 3
_EXPLORE_EVERY = 32
# What prefix_aware takes a matched prefix to save, as a part of computing it.
_PREFIX_GAIN = 0.9


class Load(NamedTuple):
    """Work pending, and work per second as measured; 0 until something was."""

    pending: float
    speed: float


class Recent(NamedTuple):
    """The recent window of one kind of work: samples in it, and their mean seconds with errors counted as slow."""

    samples: int
    seconds: float


_NOTHING = Recent(0, 0.0)


class View(NamedTuple):
    """One engine at the moment of choosing. See proxy.engines.pool.Engine for the units.

    `prefill_s`: recent prefills; `token_s`: recent seconds per token; `matched`: bytes of this request's prompt whose
    KV it probably has. `lost`: prefill engines it cannot read from.
    """

    name: str
    role: str
    kind: str
    usable: bool
    prompts: Load
    streams: Load
    prefill_s: Recent = _NOTHING
    token_s: Recent = _NOTHING
    matched: float = 0.0
    lost: frozenset[str] = frozenset()


class Candidate(NamedTuple):
    """A prefill and a decode engine; the same one twice does it all."""

    prefill: View
    decode: View

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill.name == self.decode.name


class Ask(NamedTuple):
    """A request as policies see it: bytes of prompt, how many requests came before, a random number in [0, 1)."""

    size: float
    number: int
    draw: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class EnginePair:
    """Engine names. The same name twice means that one engine does it all, and no KV moves."""

    prefill: str
    decode: str

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill == self.decode


# Picks one of the pairs, of which there is at least one.
RoutingPolicy = Callable[[Ask, Sequence[Candidate]], Candidate]


def random(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """Any."""
    return pairs[int(ask.draw * len(pairs))]


def round_robin(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """Each in turn."""
    return pairs[ask.number % len(pairs)]


def min_expected_latency(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair that would be done first: (pending + new work) / speed, of prefill and decode together.

    An engine never measured counts as as fast as the fastest known.
    """
    return _both_best(ask, pairs, _expected(ask, pairs))


def min_observed_latency(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair that was fastest lately. Those hardly tried are explored first, the rest now and then.

    Errors are in the window as slow answers: an engine that fails fast does not look fast.
    """
    new = [pair for pair in pairs if min(pair.prefill.prefill_s.samples, pair.decode.token_s.samples) < _MIN_SAMPLES]
    if new:
        return new[ask.number % len(new)]
    if ask.number % _EXPLORE_EVERY == 0:
        return pairs[ask.number // _EXPLORE_EVERY % len(pairs)]
    slowest = max(pair.decode.token_s.seconds for pair in pairs) or 1.0
    longest = max(pair.prefill.prefill_s.seconds for pair in pairs) or 1.0
    # Each half in parts of the worst one: seconds of a prefill and of a token are not of one size.
    costs = [pair.prefill.prefill_s.seconds / longest + pair.decode.token_s.seconds / slowest for pair in pairs]
    return _least(ask, pairs, costs)


def prefix_aware(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """Expected latency, a prefix that an engine has seen counted as mostly computed: load still outweighs a match."""
    costs = []
    for pair, (prefill_s, decode_s) in zip(pairs, _expected(ask, pairs), strict=True):
        work = pair.prefill.prompts.pending + ask.size
        saved = _PREFIX_GAIN * min(pair.prefill.matched, ask.size) / work if work else 0.0
        costs.append((prefill_s * (1 - saved), decode_s))
    return _both_best(ask, pairs, costs)


def slo(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair predicted to miss the targets least; among those that meet them, the one done first.

    An inline prefill is charged for the streams that wait meanwhile, a remote one for the second engine's queue.
    """
    costs = []
    for pair, (prefill_s, decode_s) in zip(pairs, _expected(ask, pairs), strict=True):
        streams = pair.decode.streams.pending
        token_s = pair.decode.token_s.seconds * (streams + 1) / max(1.0, streams)
        if pair.is_one and streams:
            token_s += prefill_s / 16
        missed = max(0.0, prefill_s / ask.ttft_s - 1) + max(0.0, token_s / ask.tpot_s - 1)
        costs.append(missed * 1000 + prefill_s + decode_s)
    return _least(ask, pairs, costs)


POLICIES: dict[str, RoutingPolicy] = {
    "random": random,
    "round_robin": round_robin,
    "min_expected_latency": min_expected_latency,
    "min_observed_latency": min_observed_latency,
    "prefix_aware": prefix_aware,
    "slo": slo,
}


def choose(
    policy: RoutingPolicy, views: Sequence[View], ask: Ask, avoid: frozenset[str] = frozenset()
) -> EnginePair | None:
    """A pair for a request; None when no engine is usable.

    `avoid` names engines that just failed this request: they are taken only if there is no other. Without both
    roles, one engine of whatever role does prefill and decode by itself.
    """
    usable = [view for view in views if view.usable]
    fresh = [view for view in usable if view.name not in avoid] or usable if avoid else usable
    if not fresh:
        return None
    pairs = candidates(fresh)
    pair = pairs[0] if len(pairs) == 1 else policy(ask, pairs)
    return EnginePair(pair.prefill.name, pair.decode.name)


def candidates(views: Sequence[View]) -> list[Candidate]:
    """Every pair of these engines that can serve a request, neighbours sharing no engine where that can be."""
    prefills = [view for view in views if view.role in _PREFILLS]
    decodes = [view for view in views if view.role in _DECODES]
    hybrids = [view for view in views if view.role == "hybrid"]
    inline = [Candidate(view, view) for view in hybrids]
    if len(hybrids) == len(views):
        return inline
    pairs = [
        Candidate(prefill, decodes[(number + shift) % len(decodes)])
        for shift in range(len(decodes))
        for number, prefill in enumerate(prefills)
    ]
    able = [pair for pair in pairs if not pair.is_one and _reaches(pair)]
    return able + inline or [Candidate(view, view) for view in views]


def _reaches(pair: Candidate) -> bool:
    return pair.prefill.kind == pair.decode.kind and pair.prefill.name not in pair.decode.lost


def _expected(ask: Ask, pairs: Sequence[Candidate]) -> list[tuple[float, float]]:
    """Seconds of prefill and of decode for each pair."""
    fastest = max(pair.prefill.prompts.speed for pair in pairs) or 1.0
    quickest = max(pair.decode.streams.speed for pair in pairs) or 1.0
    found = []
    for pair in pairs:
        prompts, streams = pair.prefill.prompts, pair.decode.streams
        prefill_s = (prompts.pending + ask.size) / (prompts.speed or fastest)
        # Streams of one engine run side by side: what counts is its share, relative to an idle one.
        found.append((prefill_s, (streams.pending + 1) / (streams.speed or quickest)))
    return found


def _both_best(ask: Ask, pairs: Sequence[Candidate], costs: Sequence[tuple[float, float]]) -> Candidate:
    """The pair whose halves are each the best there is; where no pair has both, the least in sum.

    By halves, for a prefill's seconds would vanish beside those of a long answer's decode.
    """
    limits = [min(cost[half] for cost in costs) * _EQUAL for half in (0, 1)]
    good = [pair for pair, cost in zip(pairs, costs, strict=True) if cost[0] <= limits[0] and cost[1] <= limits[1]]
    return good[ask.number % len(good)] if good else _least(ask, pairs, [sum(cost) for cost in costs])


def _least(ask: Ask, pairs: Sequence[Candidate], costs: Sequence[float]) -> Candidate:
    limit = min(costs) * _EQUAL
    good = [pair for pair, cost in zip(pairs, costs, strict=True) if cost <= limit]
    return good[ask.number % len(good)]
