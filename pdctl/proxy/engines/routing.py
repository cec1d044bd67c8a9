"""Routing: the choice of a prefill and a decode engine, as pure functions over a snapshot of the pool.

A policy gets every pair that could serve the request and chooses one; both engines are chosen together. An engine
paired with itself serves the request alone, and no KV moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_PREFILLS = ("prefill", "hybrid")
_DECODES = ("decode", "hybrid")
# Differences within a tenth of the best are noise: such pairs take turns.
_EQUAL = 1.1
# An engine with fewer samples in its recent window is explored first; and the interval, in requests, at which others
# are tried again.
_MIN_SAMPLES = 3
_EXPLORE_EVERY = 32
# Engines of each role that are paired for one request. All pairs of many engines would take seconds to compare, and the
# best of some is nearly as good (Mitzenmacher, The power of two choices in randomized load balancing, 2001).
_PAIRED = 16
# The fraction of the prefill time that prefix_aware assumes a matched prefix to save.
_PREFIX_GAIN = 0.9


class Load(NamedTuple):
    """Pending work, and measured work per second (0: unknown)."""

    pending: float
    speed: float


class Recent(NamedTuple):
    """The recent window of one kind of work: number of samples, and mean seconds with errors counted as slow."""

    samples: int
    seconds: float


_NOTHING = Recent(0, 0.0)


class View(NamedTuple):
    """One engine at the time of the choice. See proxy.engines.pool.Engine for the units.

    `kind`: engines with the same value can exchange KV; `prefill_s`: recent prefills; `token_s`: recent seconds per
    token; `matched`: bytes of this request's prompt for which it probably has KV. `lost`: prefill engines from which it
    cannot read. `alone`: it can compute a whole answer; `pairs`: it can be one of a pair."""

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
    alone: bool = True
    pairs: bool = True


class Candidate(NamedTuple):
    """A prefill and a decode engine; may be the same engine."""

    prefill: View
    decode: View

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill.name == self.decode.name


class Ask(NamedTuple):
    """A request for policies: prompt bytes, number of earlier requests, a random number in [0, 1)."""

    size: float
    number: int
    draw: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class EnginePair:
    """Names of a prefill and a decode engine. If they are equal, one engine serves the request and no KV moves."""

    prefill: str
    decode: str

    @property
    def is_one(self) -> bool:
        """Whether no hand-over is needed."""
        return self.prefill == self.decode


# Chooses one of the pairs; there is at least one.
RoutingPolicy = Callable[[Ask, Sequence[Candidate]], Candidate]


def random(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """A random pair."""
    return pairs[int(ask.draw * len(pairs))]


def round_robin(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """Each in turn."""
    return pairs[ask.number % len(pairs)]


def min_expected_latency(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair expected to finish first: (pending + new work) / speed, for prefill plus decode.

    An engine without measurements counts as fast as the fastest known one.
    """
    return _both_best(ask, pairs, _expected(ask, pairs))


def min_observed_latency(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair that was fastest recently. Rarely tried pairs are explored first, and others from time to time.

    Errors count as slow answers, so that an engine that fails fast does not look fast.
    """
    new = [pair for pair in pairs if min(pair.prefill.prefill_s.samples, pair.decode.token_s.samples) < _MIN_SAMPLES]
    if new:
        return new[ask.number % len(new)]
    if ask.number % _EXPLORE_EVERY == 0:
        return pairs[ask.number // _EXPLORE_EVERY % len(pairs)]
    slowest = max(pair.decode.token_s.seconds for pair in pairs) or 1.0
    longest = max(pair.prefill.prefill_s.seconds for pair in pairs) or 1.0
    # Normalize each part by its worst value: seconds per prefill and per token have different scales.
    costs = [pair.prefill.prefill_s.seconds / longest + pair.decode.token_s.seconds / slowest for pair in pairs]
    return _least(ask, pairs, costs)


def prefix_aware(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """Expected latency, with known prefixes counted as mostly computed. A high load still outweighs a match."""
    costs = []
    for pair, (prefill_s, decode_s) in zip(pairs, _expected(ask, pairs), strict=True):
        work = pair.prefill.prompts.pending + ask.size
        saved = _PREFIX_GAIN * min(pair.prefill.matched, ask.size) / work if work else 0.0
        costs.append((prefill_s * (1 - saved), decode_s))
    return _both_best(ask, pairs, costs)


def slo(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
    """The pair predicted to miss the targets least; among those that meet them, the one expected to finish first.

    An inline prefill costs the delay of running streams, a remote one the second engine's queue.
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
    policy: RoutingPolicy,
    views: Sequence[View],
    ask: Ask,
    avoid: frozenset[str] = frozenset(),
    alone: bool = False,
) -> EnginePair | None:
    """Choose a pair for a request; None if no engine is available.

    `avoid`: engines that have just failed this request; they are used only if there is no other. If a role is missing,
    one engine that can do so serves the request alone. `alone`: prefer an engine that is never one of a pair.
    """
    usable, ask = _narrowed([view for view in views if view.usable], ask)
    fresh = [view for view in usable if view.name not in avoid]
    pairs = (candidates(fresh) or candidates(usable)) if avoid else candidates(usable)
    if alone:
        pairs = [pair for pair in pairs if pair.is_one and not pair.prefill.pairs] or pairs
    if not pairs:
        return None
    pair = pairs[0] if len(pairs) == 1 else policy(ask, pairs)
    return EnginePair(pair.prefill.name, pair.decode.name)


def _narrowed(views: list[View], ask: Ask) -> tuple[list[View], Ask]:
    """Some engines of each role, others for the next request; all of a fleet that is small, or has only one role."""
    by_role: dict[str, list[View]] = {}
    for view in views:
        by_role.setdefault(view.role, []).append(view)
    turns = max((-(-len(those) // _PAIRED) for those in by_role.values()), default=1)
    if turns == 1 or len(by_role) == 1:
        return views, ask
    found = []
    for those in by_role.values():
        stride = -(-len(those) // _PAIRED)
        some = those[ask.number % turns % stride :: stride]
        # The one that has most of the prompt is always among them.
        best = max(those, key=lambda view: view.matched)
        found += some if not best.matched or best in some else [*some, best]
    # Policies take turns among these, too.
    return found, ask._replace(number=ask.number // turns)


def candidates(views: Sequence[View]) -> list[Candidate]:
    """All pairs of these engines that can serve a request, ordered so that neighbours share no engine if possible."""
    prefills = [view for view in views if view.role in _PREFILLS and view.pairs]
    decodes = [view for view in views if view.role in _DECODES and view.pairs]
    hybrids = [view for view in views if view.role == "hybrid"]
    inline = [Candidate(view, view) for view in hybrids]
    if len(hybrids) == len(views):
        return inline
    # Two hybrid engines do not move KV to each other: KV goes only from prefill to hybrid to decode engines. So no two
    # engines, full of KV for each other, wait for each other's blocks. One loop: there may be hundreds of pairs.
    able = [
        Candidate(prefill, decode)
        for shift in range(len(decodes))
        for number, prefill in enumerate(prefills)
        if (decode := decodes[(number + shift) % len(decodes)]).kind == prefill.kind
        and prefill.name not in decode.lost
        and not (prefill.role == decode.role == "hybrid")
    ]
    return able + inline or [Candidate(view, view) for view in views if view.alone]


def _expected(ask: Ask, pairs: Sequence[Candidate]) -> list[tuple[float, float]]:
    """Seconds of prefill and of decode for each pair."""
    # An engine is in many pairs.
    prompts = {pair.prefill.name: pair.prefill.prompts for pair in pairs}
    streams = {pair.decode.name: pair.decode.streams for pair in pairs}
    fastest = max(load.speed for load in prompts.values()) or 1.0
    quickest = max(load.speed for load in streams.values()) or 1.0
    prefill_s = {name: (load.pending + ask.size) / (load.speed or fastest) for name, load in prompts.items()}
    # Streams of an engine share its speed: the cost is the share relative to an idle engine.
    decode_s = {name: (load.pending + 1) / (load.speed or quickest) for name, load in streams.items()}
    return [(prefill_s[pair.prefill.name], decode_s[pair.decode.name]) for pair in pairs]


def _both_best(ask: Ask, pairs: Sequence[Candidate], costs: Sequence[tuple[float, float]]) -> Candidate:
    """The pair with the best prefill and the best decode engine; if there is none, the pair with the least sum.

    The parts are compared separately because the decode time of a long answer would dominate the prefill time.
    """
    longest_prefill, longest_decode = (min(cost[half] for cost in costs) * _EQUAL for half in (0, 1))
    good = [
        pair
        for pair, (prefill_s, decode_s) in zip(pairs, costs, strict=True)
        if prefill_s <= longest_prefill and decode_s <= longest_decode
    ]
    return good[ask.number % len(good)] if good else _least(ask, pairs, [sum(cost) for cost in costs])


def _least(ask: Ask, pairs: Sequence[Candidate], costs: Sequence[float]) -> Candidate:
    limit = min(costs) * _EQUAL
    good = [pair for pair, cost in zip(pairs, costs, strict=True) if cost <= limit]
    return good[ask.number % len(good)]
