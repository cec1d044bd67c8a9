"""The limits of API keys over the proxies of several nodes, against one bucket that sees everything at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.proxy.shares.elsewhere import Elsewhere
from pdctl.proxy.shares.limits import Bucket, KeyLimits, Levels, Totals
from pdctl.proxy_wire import KeySettings, KeySpent, SourceSpent, SpentNews

LIMIT = 600
RATE = LIMIT / 60


def spent(requests: float, tokens: float = 0.0, level: float = 0.0, streams: float = 0.0) -> KeySpent:
    return KeySpent(requests, tokens, streams, level, level)


def news(age_s: float = 0.0, **sources: KeySpent) -> SpentNews:
    return SpentNews({name: SourceSpent(age_s, {"k": mine}) for name, mine in sources.items()}, {})


def test_differences_are_charged_and_repetitions_are_not() -> None:
    elsewhere = Elsewhere()
    assert elsewhere.take(news(), 0.0).taken == {}
    assert elsewhere.take(news(b=spent(3, 90, 100), c=spent(1, 10, 100)), 1.0).taken == {"k": Totals(4, 100)}
    assert elsewhere.take(news(b=spent(3, 90), c=spent(1, 10)), 2.0).taken == {}
    assert elsewhere.take(news(b=spent(5, 60), c=spent(1, 10)), 3.0).taken == {"k": Totals(2, -30)}, "tokens come back"
    assert elsewhere.take(news(b=spent(4, 60), c=spent(1, 10)), 4.0).taken == {}, "older numbers than those before"
    assert elsewhere.take(news(b=spent(6, 60), c=spent(1, 10)), 5.0).taken == {"k": Totals(1, 0)}


def test_a_proxy_that_starts_begins_at_the_highest_level_and_charges_no_history() -> None:
    elsewhere = Elsewhere()
    told = SpentNews(
        {"b": SourceSpent(0.5, {"k": spent(9000, level=40)})}, {"old": SourceSpent(2.0, {"k": spent(70, level=50)})}
    )
    found = elsewhere.take(told, 0.0)
    assert found.levels == [("k", Levels(40, 40, 0.5)), ("k", Levels(50, 50, 2.0))]
    assert found.taken == {}
    limits = KeyLimits(KeySettings("k", requests_per_minute=60))
    for key, levels in found.levels:
        assert key == "k"
        limits.raise_to(levels, 0.0)
    assert limits.levels(0.0).requests == 48
    assert elsewhere.take(news(b=spent(9001)), 1.0).taken == {"k": Totals(1, 0)}


def test_what_was_spent_during_a_cut_is_charged_up_to_the_level_there() -> None:
    elsewhere = Elsewhere()
    elsewhere.take(news(b=spent(1), c=spent(1)), 0.0)
    for now in range(1, 300):
        # The agent repeats what it heard last.
        assert elsewhere.take(news(float(now), b=spent(1), c=spent(1)), float(now)).taken == {}
    found = elsewhere.take(news(b=spent(2000, level=300), c=spent(2000, level=310)), 300.0)
    assert found.taken == {"k": Totals(310, 0)}
    assert elsewhere.take(news(b=spent(2001), c=spent(2000)), 301.0).taken == {"k": Totals(1, 0)}


def test_answers_of_a_node_that_is_silent_do_not_count_for_ever() -> None:
    elsewhere = Elsewhere()
    assert elsewhere.take(news(b=spent(1, streams=2), c=spent(1, streams=1)), 0.0).streams == {"k": 3}
    assert elsewhere.take(news(9.0, b=spent(1, streams=2)), 9.0).streams == {"k": 2}
    assert elsewhere.take(news(11.0, b=spent(1, streams=2)), 11.0).streams == {}
    assert elsewhere.take(news(), 12.0).streams == {}


def test_sources_that_are_gone_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.proxy.shares.elsewhere._MAX_SOURCES", 3)
    elsewhere = Elsewhere()
    for number in range(10):
        elsewhere.take(news(0.0, **{f"s{number}": spent(1)}), float(number))
    assert sorted(elsewhere._sources) == ["s7", "s8", "s9"]
    elsewhere.take(news(), 9.0 + 3600.0)
    assert not elsewhere._sources


@dataclass
class Proxy:
    """One start of a proxy, with what it was told and has told."""

    name: str
    limits: KeyLimits = field(default_factory=lambda: KeyLimits(KeySettings("k", requests_per_minute=LIMIT)))
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    own: float = 0.0

    def spend(self, amount: int, now: float) -> None:
        self.limits.charge(amount, 0, now)
        self.own += amount

    def report(self, now: float) -> KeySpent:
        return spent(self.own, level=self.limits.levels(now).requests)

    def hear(self, told: SpentNews, now: float) -> None:
        found = self.elsewhere.take(told, now)
        for _, levels in found.levels:
            self.limits.raise_to(levels, now)
        for taken in found.taken.values():
            self.limits.charge(taken.requests, 0, now)

    def level(self, now: float) -> float:
        return self.limits.levels(now).requests


class Cluster:
    """Proxies that exchange through agents. `last`: the last report of each start, with its time, as agents keep it."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.proxies = [Proxy(f"p{number}@0") for number in range(count)]
        self.last: dict[str, tuple[float, KeySpent]] = {}
        self.exact = Bucket(float(LIMIT))
        self.lost = 0.0
        for number in range(count):
            self.exchange(number, set())

    def spend(self, number: int, amount: int) -> None:
        self.proxies[number].spend(amount, self.now)
        self.exact.take(amount, self.now)

    def exchange(self, number: int, unheard: set[int]) -> None:
        """An agent tells its proxy what it has last heard of all others, and keeps the answer."""
        proxy = self.proxies[number]
        there = {
            name: SourceSpent(self.now - at, {"k": report}) for name, (at, report) in self.last.items()
            if name.split("@")[0] != f"p{number}"
        }  # fmt: skip
        here = {
            name: SourceSpent(self.now - at, {"k": report}) for name, (at, report) in self.last.items()
            if name.split("@")[0] == f"p{number}"
        }  # fmt: skip
        proxy.hear(msgspec.json.decode(msgspec.json.encode(SpentNews(there, here)), type=SpentNews), self.now)
        if number not in unheard:
            self.last[proxy.name] = self.now, proxy.report(self.now)

    def restart(self, number: int) -> None:
        """What it spent since its last report is known to nobody."""
        before = self.proxies[number]
        told = self.last[before.name][1].requests if before.name in self.last else 0.0
        self.lost += before.own - told
        name, _, start = before.name.partition("@")
        self.proxies[number] = Proxy(f"{name}@{int(start) + 1}")

    def settle(self) -> None:
        """Everybody has heard everybody."""
        for _ in range(2):
            for number in range(len(self.proxies)):
                self.exchange(number, set())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("spend", "spend", "exchange", "unheard", "restart", "wait")),
        st.integers(0, 3), st.integers(1, 30), st.floats(0.0, 1.0),
    ),
    max_size=80,
)  # fmt: skip


@settings(max_examples=200)
@given(st.integers(1, 4), STEPS)
def test_nothing_is_charged_twice_or_forgotten(count: int, steps: list[tuple[str, int, int, float]]) -> None:
    """No refill: the time stands still, so all that was spent and reported is the level of every proxy."""
    cluster = Cluster(count)
    for what, number, amount, _ in steps:
        number %= count
        if what == "spend":
            cluster.spend(number, amount)
        elif what in ("exchange", "unheard"):
            cluster.exchange(number, {number} if what == "unheard" else set())
        elif what == "restart":
            # What others have not yet told each other when it begins is missed by the new start alone.
            cluster.settle()
            cluster.spend(number, amount)
            cluster.restart(number)
            cluster.exchange(number, set())
    cluster.settle()
    for proxy in cluster.proxies:
        assert proxy.level(0.0) == pytest.approx(cluster.exact.level(0.0) - cluster.lost)


@settings(max_examples=200)
@given(st.integers(1, 4), STEPS)
def test_levels_follow_one_bucket_as_late_as_the_exchange(
    count: int, steps: list[tuple[str, int, int, float]]
) -> None:
    """With refill, and an exchange at least every second: never less than the one bucket after an exchange, and more
    only by what is refilled during the delay."""
    cluster = Cluster(count)
    for what, number, amount, seconds in steps:
        if what == "spend":
            cluster.spend(number % count, amount)
        elif what == "wait":
            cluster.now += seconds
            for member in range(count):
                cluster.exchange(member, set())
        elif what == "exchange":
            cluster.exchange(number % count, set())
        for proxy in cluster.proxies:
            assert proxy.level(cluster.now) <= cluster.exact.level(cluster.now) + 2 * RATE + 1e-6
    cluster.settle()
    for proxy in cluster.proxies:
        assert proxy.level(cluster.now) >= cluster.exact.level(cluster.now) - 1e-6


@settings(max_examples=100)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400)), min_size=1, max_size=200))
def test_the_overshoot_is_what_the_others_do_not_know_yet(count: int, wishes: list[tuple[int, int]]) -> None:
    """Whatever is wanted where: between two exchanges each proxy takes at most what it believes to be left."""
    cluster, taken = Cluster(count), 0
    for number, wanted in wishes:
        number %= count
        proxy = cluster.proxies[number]
        amount = min(wanted, int(LIMIT - proxy.level(cluster.now)))
        if amount > 0:
            cluster.spend(number, amount)
            taken += amount
    assert taken <= count * LIMIT
    cluster.settle()
    if taken >= LIMIT:
        assert all(proxy.level(cluster.now) >= LIMIT - 1e-6 for proxy in cluster.proxies), "and it is paid for"
