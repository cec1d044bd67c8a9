"""Which engines to run for a load: tries roles, counts, chunk sizes, policies and inline prefill in virtual time.

A search in three rounds, each with fewer setups and more requests: roles and inline prefill; chunks and policies for
the best of them; then the finalists under the whole load, with several seeds. The intervals come from resampled blocks
of consecutive requests (block bootstrap; Künsch, 1989), because requests that follow one another wait for each other;
the blocks are the same for all setups, which are compared under one load."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pdctl.bench import Record
from pdctl.bench.measurements import Targets, percentile, samples
from pdctl.simulation.service import Service
from pdctl.simulation.spec import Arrival, EngineSpec, ServiceSpec

CHUNKS = (128, 256, 512, 1024, 2048)
_POLICIES = ("fcfs", "sjf", "edf")
# Setups that reach the second and the third round, and the most splits of many engines that are tried.
_SECOND, _FINALISTS, _MOST_SPLITS = 3, 5, 9
_BLOCKS, _RESAMPLED = 20, 1000
# A split that gives less in addition, as a part, is not worth its transfers.
_WORTH = 0.02
# Of two setups that keep the targets equally often, the one with the better medians is better: by so much at most.
_TIE = 0.02


@dataclass(frozen=True, slots=True)
class Setup:
    """A way to run the engines. `chunk`: tokens per step."""

    prefills: int
    decodes: int
    hybrids: int
    chunk: int
    policy: str
    inline: bool

    @property
    def is_split(self) -> bool:
        """Whether prefill and decode are on different engines."""
        return bool(self.prefills or self.decodes)

    @property
    def roles(self) -> str:
        """The engines, as words."""
        hybrids = "hybrid" if self.hybrids == 1 else "hybrids"
        counts = ((self.prefills, "prefill"), (self.decodes, "decode"), (self.hybrids, hybrids))
        return " + ".join(f"{count} {role}" for count, role in counts if count)

    def __str__(self) -> str:
        inline = "inline prefill" if self.inline else "no inline prefill"
        return f"{self.roles}, chunk {self.chunk}, {self.policy}, {inline}"

    def service(self, base: ServiceSpec) -> ServiceSpec:
        """The service with these engines, otherwise like the first one of `base`."""
        like = replace(
            base.engines[0], max_num_batched_tokens=self.chunk, policy=self.policy, inline_prefill=self.inline
        )
        return replace(base, engines=tuple(_engines(self, like)))


def _engines(setup: Setup, like: EngineSpec) -> Iterator[EngineSpec]:
    for role, count in (("prefill", setup.prefills), ("decode", setup.decodes), ("hybrid", setup.hybrids)):
        for number in range(count):
            yield replace(like, name=f"{role}-{number}", role=role)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A setup under a load, over all seeds. Latencies in milliseconds. `met`: by block of requests, how many kept the
    targets, and how many there were. `rate`: requests per second of the load."""

    setup: Setup
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    met: tuple[tuple[int, int], ...]
    rate: float
    busy: float

    @property
    def attained(self) -> float:
        """The part of the requests that kept the targets."""
        return sum(met for met, _ in self.met) / sum(count for _, count in self.met)

    @property
    def goodput(self) -> float:
        """Requests per second that kept the targets."""
        return self.attained * self.rate

    def score(self, targets: Targets) -> float:
        """More is better."""
        parts = ((self.ttft_p50, targets.ttft), (self.tpot_p50, targets.tpot))
        return self.attained - _TIE * sum(min(1.0, value / limit) for value, limit in parts if limit) / 2


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_zero(self) -> bool:
        """Whether it may be zero."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True)
class Advice:
    """The finalists, the best first. `together`: the best setup without a split; `split`: the best one with one."""

    finalists: tuple[Outcome, ...]
    together: Outcome
    split: Outcome | None
    tried: int

    @property
    def best(self) -> Outcome:
        """The setup to use: without a split unless one is shown to be better, as it needs no transfers."""
        return self.split if self.split is not None and self._is_worth(self.split) else self.together

    def _is_worth(self, split: Outcome) -> bool:
        gain = self.gain(split, self.together)
        return gain.low > 0 and gain.value > _WORTH * self.together.goodput

    def goodput(self, outcome: Outcome) -> Interval:
        """Its goodput per second."""
        drawn = _drawn([outcome])
        return Interval(outcome.goodput, *_ends([part * outcome.rate for (part,) in drawn]))

    def gain(self, one: Outcome, other: Outcome) -> Interval:
        """The goodput per second that `one` has more than `other`."""
        drawn = [a * one.rate - b * other.rate for a, b in _drawn([one, other])]
        return Interval(one.goodput - other.goodput, *_ends(drawn))

    def verdict(self) -> str:
        """The advice as a sentence."""
        together, split = self.together, self.split
        if split is None:
            return f"one engine cannot be split: {together.setup}"
        gain = self.gain(split, together)
        if self._is_worth(split):
            return f"disaggregate: {split.setup.roles} give {_more(gain)} than {together.setup.roles}"
        if gain.low > 0:
            return (
                f"do not disaggregate: {split.setup.roles} need transfers, and give hardly more than "
                f"{together.setup.roles}: {_more(gain)}"
            )
        if gain.high < 0:
            less = self.gain(together, split)
            return f"do not disaggregate: {together.setup.roles} give {_more(less)} than {split.setup.roles}"
        return (
            f"do not disaggregate: {split.setup.roles} need transfers, and are not shown to be better than "
            f"{together.setup.roles}: they give {_more(gain)}"
        )


def _more(gain: Interval) -> str:
    return f"{gain.value:.3g} ({gain.low:.3g} to {gain.high:.3g}) requests/s more within the targets"


def advise(
    base: ServiceSpec,
    engines: int,
    loads: Sequence[Sequence[Arrival]],
    targets: Targets,
    tell: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Search. `loads`: one for each seed, all of one length; the first rounds use a part of the first one."""
    tried: dict[Setup, Outcome] = {}

    def run(setups: Sequence[Setup], part: Sequence[Sequence[Arrival]]) -> list[Outcome]:
        found = []
        for number, setup in enumerate(setups, 1):
            found.append(outcome(setup, base, part, targets))
            tell(f"{number} of {len(setups)}: {setup}: {found[-1].attained:.1%} within the targets")
        tried.update({one.setup: one for one in found})
        return sorted(found, key=lambda one: -one.score(targets))

    short = [loads[0][: max(100, len(loads[0]) // 2)]]
    first = run(setups(engines, base.engines[0]), short)
    leaders = _leaders(first, _SECOND)
    second = run([other for one in leaders for other in _varied(one.setup) if other not in tried], short)
    ranked = sorted(tried.values(), key=lambda one: -one.score(targets))
    third = run([one.setup for one in _leaders(ranked, _FINALISTS)], loads)
    split = next((one for one in third if one.setup.is_split), None)
    together = next(one for one in third if not one.setup.is_split)
    return Advice(tuple(third), together, split, len(first) + len(second))


def _leaders(ranked: Sequence[Outcome], count: int) -> list[Outcome]:
    """The best, among them the best with a split and the best without one."""
    # A policy often decides nothing: of setups with the same results one is enough.
    distinct = {replace(one, setup=ranked[0].setup): one for one in reversed(ranked)}
    found = [one for one in ranked if one in distinct.values()][:count]
    for wanted in (True, False):
        best = next((one for one in ranked if one.setup.is_split is wanted), None)
        if best is not None and best not in found:
            found.append(best)
    return found


def setups(engines: int, like: EngineSpec) -> list[Setup]:
    """What the first round tries: all hybrids, and splits with and without hybrids."""
    chunk, policy = like.max_num_batched_tokens, like.policy
    splits = [(0, 0, engines)]
    if engines > 1:
        steps = min(engines - 1, _MOST_SPLITS)
        for prefills in sorted({max(1, round(engines * step / (steps + 1))) for step in range(1, steps + 1)}):
            others = engines - prefills
            splits.append((prefills, others, 0))
            if others > 1:
                splits += [(prefills, 0, others), (prefills, others - 1, 1)]
    return [Setup(p, d, h, chunk, policy, inline) for p, d, h in splits for inline in (True, False)]


def _varied(setup: Setup) -> list[Setup]:
    """Other chunks, and other policies."""
    chunks = [replace(setup, chunk=chunk) for chunk in CHUNKS]
    return chunks + [replace(setup, policy=policy) for policy in _POLICIES]


def outcome(setup: Setup, base: ServiceSpec, loads: Sequence[Sequence[Arrival]], targets: Targets) -> Outcome:
    """Simulate a setup under each load."""
    records: list[Record] = []
    met: list[tuple[int, int]] = []
    busy = 0.0
    for seed, load in enumerate(loads):
        service = Service(setup.service(base), seed)
        found = service.run(load)
        service.audit()
        records += found
        met += _by_block([targets.are_met(record) for record in found])
        lasted = max(record.ended_at for record in found) - load[0].at
        nodes = [place.node for place in service.places.values()]
        busy += sum(node.busy_s for node in nodes) / len(nodes) / max(lasted, 1e-9) / len(loads)
    values = samples(records)
    ttft, tpot = values["ttft"], values["tpot"]
    return Outcome(
        setup, percentile(ttft, 50), percentile(ttft, 99), percentile(tpot, 50), percentile(tpot, 99), tuple(met),
        len(records) / max(sum(load[-1].at - load[0].at for load in loads), 1e-9), busy,
    )  # fmt: skip


def _by_block(met: Sequence[bool]) -> list[tuple[int, int]]:
    size = max(1, -(-len(met) // _BLOCKS))
    return [(sum(met[at : at + size]), len(met[at : at + size])) for at in range(0, len(met), size)]


def _drawn(outcomes: Sequence[Outcome]) -> list[tuple[float, ...]]:
    """Attainments of all outcomes in each resample of their blocks."""
    rng = random.Random(1)  # noqa: S311 - resampling
    blocks = range(len(outcomes[0].met))
    assert all(len(one.met) == len(blocks) for one in outcomes)
    found = []
    for _ in range(_RESAMPLED):
        chosen = rng.choices(blocks, k=len(blocks))
        counts = sum(outcomes[0].met[block][1] for block in chosen)
        found.append(tuple(sum(one.met[block][0] for block in chosen) / counts for one in outcomes))
    return found


def _ends(drawn: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(drawn)
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
