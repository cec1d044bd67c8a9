from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.net.openai.api import ApiError
from pdctl.proxy.shares import shared_totals
from pdctl.proxy.shares.accounts import Accounts, LimitReached
from pdctl.proxy.shares.limits import Bucket, Exceeded, KeyLimits, Levels, Totals, duration
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy.shares.shared_totals import SharedTotals
from pdctl.proxy_wire import KeySettings


@given(st.integers(1, 10_000))
def test_a_burst_gets_exactly_the_limit_and_then_an_even_flow(limit: int) -> None:
    bucket = Bucket(float(limit))
    taken = 0
    while not bucket.wait_s(1, 7.0):
        bucket.take(1, 7.0)
        taken += 1
    assert taken == limit
    wait_s = bucket.wait_s(1, 7.0)
    assert wait_s == pytest.approx(60 / limit)
    assert bucket.wait_s(1, 7.0 + 0.999 * wait_s) > 0
    assert bucket.wait_s(1, 7.0 + 1.001 * wait_s) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_no_window_has_more_than_a_burst_and_its_flow(limit: int, gaps: list[float]) -> None:
    bucket, now, taken = Bucket(float(limit)), 0.0, list[float]()
    for gap in gaps:
        now += gap
        for _ in range(20):
            if not bucket.wait_s(1, now):
                bucket.take(1, now)
                taken.append(now)
    for first in range(0, len(taken), 7):
        for last in range(first, len(taken), 11):
            assert last - first + 1 <= limit + (taken[last] - taken[first]) * limit / 60 + 1e-3


def test_more_than_the_limit_passes_a_full_bucket_and_is_paid_for() -> None:
    bucket = Bucket(100.0)
    assert bucket.wait_s(1000, 0.0) == 0
    bucket.take(1000, 0.0)
    assert bucket.remaining(0.0) == 0
    assert bucket.wait_s(1, 0.0) == pytest.approx(901 * 0.6)
    bucket.take(-950, 0.0)
    assert bucket.remaining(0.0) == 50
    assert bucket.full_s(0.0) == pytest.approx(30)


def limits(**given_limits: int) -> KeyLimits:
    return KeyLimits(KeySettings("k", **given_limits))


def test_all_limits_must_allow_a_request_and_a_refused_one_takes_nothing() -> None:
    found = limits(requests_per_minute=3, tokens_per_minute=100, streams=2)
    assert found.take(40, 1, 0.0) is None
    assert found.take(70, 1, 0.0) == Exceeded("tokens_per_minute", 6.0)
    assert found.take(10, 2, 0.0) == Exceeded("streams", 1.0)
    assert found.take(10, 1, 0.0) is None
    assert found.remaining(0.0) == (1.0, 50.0)
    found.settle(40, 15, 1, 0.0)
    assert found.remaining(0.0) == (1.0, 75.0)
    assert found.take(10, 1, 0.0) is None
    found.settle(10, 10, 1, 0.0)
    assert found.take(1, 1, 0.0) == Exceeded("requests_per_minute", 20.0)
    found.audit()


def test_other_limits_keep_what_was_used() -> None:
    found = limits(requests_per_minute=10)
    for _ in range(4):
        assert found.take(1, 1, 0.0) is None
    found.follow(KeySettings("k", requests_per_minute=5))
    assert found.remaining(0.0)[0] == 1
    found.follow(KeySettings("k"))
    for _ in range(100):
        assert found.take(1, 1, 0.0) is None
    found.audit()


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_the_books_are_never_negative(seed: int) -> None:
    rng, now, running = random.Random(seed), 0.0, list[tuple[float, int]]()
    found = limits(requests_per_minute=30, tokens_per_minute=5000, streams=4)
    for _ in range(200):
        now += rng.expovariate(1.0)
        tokens, streams = rng.uniform(0, 4000), rng.choice((1, 1, 2))
        if rng.random() < 0.5 and found.take(tokens, streams, now) is None:
            running.append((tokens, streams))
        elif running:
            taken, streams = running.pop(rng.randrange(len(running)))
            found.settle(taken, rng.uniform(0, taken * 1.2), streams, now)
        found.audit()
        assert found.own.streams == sum(streams for _, streams in running) <= 4
        assert min(found.remaining(now)) >= 0


def test_headers_have_openais_names_and_durations() -> None:
    found = limits(requests_per_minute=60, tokens_per_minute=150_000)
    assert found.take(150_000, 1, 5.0) is None
    assert dict(found.headers(5.0)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"150000",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"1m0s",
    }
    assert [name for name, _ in limits(streams=3).headers(0.0)] == []
    assert [duration(seconds) for seconds in (0, 0.0071, 1.24, 59.0, 360, 3602)] == [
        "0ms", "8ms", "1.3s", "59s", "6m0s", "1h0m2s",
    ]  # fmt: skip


class Workers:
    """The limits of one key in several workers of a proxy."""

    def __init__(self, folder: Path, count: int, **given_limits: int) -> None:
        self.path, self.count = folder / "totals", count
        self.settings = KeySettings("k", **given_limits)
        self.totals = [SharedTotals(self.path, count, worker) for worker in range(count)]
        self.limits: list[KeyLimits | None] = [None] * count

    def take(self, worker: int, tokens: float, now: float) -> bool:
        limits, totals = self.of(worker, now), self.totals[worker]
        limits.others_took(totals.others("k"), now)
        if limits.take(tokens, 1, now) is not None:
            return False
        totals.publish("k", limits.own, limits.levels(now), now)
        return True

    def of(self, worker: int, now: float) -> KeyLimits:
        if (found := self.limits[worker]) is None:
            found = self.limits[worker] = KeyLimits(self.settings)
            for levels in self.totals[worker].meet("k", now):
                found.raise_to(levels, now)
        return found

    def settle(self, worker: int, taken: float, tokens: float, now: float) -> None:
        limits = self.of(worker, now)
        limits.settle(taken, tokens, 1, now)
        self.totals[worker].publish("k", limits.own, limits.levels(now), now)

    def restart(self, worker: int) -> None:
        self.totals[worker] = SharedTotals(self.path, self.count, worker)
        self.limits[worker] = None


def test_workers_count_together(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 3, requests_per_minute=30, tokens_per_minute=10_000)
    taken = [worker for number in range(90) if workers.take(worker := number % 3, 10, 0.0)]
    assert len(taken) == 30
    for worker in taken:
        workers.settle(worker, 10, 4, 0.0)
    assert workers.take(0, 1, 2.0)
    requests, tokens = workers.of(0, 2.0).remaining(2.0)
    assert requests == 0
    assert tokens == 10_000 - 1, "what 30 requests used is refilled"


def test_workers_have_the_answers_at_once_together(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, streams=3)
    assert [workers.take(worker, 1, 0.0) for worker in (0, 1, 0, 1, 0)] == [True, True, True, False, False]
    workers.settle(0, 1, 1, 0.0)
    assert workers.take(1, 1, 0.0)
    assert not workers.take(0, 1, 0.0)


def test_a_restarted_worker_counts_from_zero(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, requests_per_minute=20)
    for _ in range(8):
        assert workers.take(1, 1, 0.0)
    assert workers.take(0, 1, 0.0)
    workers.restart(1)
    assert workers.take(1, 1, 0.0)
    assert workers.take(0, 1, 0.0)
    assert workers.of(0, 0.0).remaining(0.0)[0] == 20 - 8 - 1 - 1 - 1, "nothing is counted twice or given back"


def test_a_restarted_worker_begins_where_the_others_are(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, requests_per_minute=20)
    for now in range(0, 600, 60):
        assert all(workers.take(0, 1, float(now)) for _ in range(20)), "a minute's worth, ten times"
    workers.restart(1)
    assert workers.of(1, 570.0).remaining(570.0)[0] == 10, "half of the last minute's worth is refilled"
    assert [workers.take(number % 2, 1, 570.0) for number in range(11)] == [True] * 10 + [False]


def test_a_worker_that_was_restarted_twice_as_busy_counts_from_zero(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, requests_per_minute=50)
    assert workers.take(1, 1, 0.0)
    assert workers.take(0, 1, 0.0)
    workers.restart(1)
    for _ in range(5):
        assert workers.take(1, 1, 0.0)
    assert workers.take(0, 1, 0.0)
    assert workers.of(0, 0.0).remaining(0.0)[0] == 50 - 1 - 5 - 2


def test_keys_beyond_the_table_are_counted_by_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_totals, "_MAX_KEYS", 2)
    one, other = (SharedTotals(tmp_path / "totals", 2, worker) for worker in range(2))
    for key in ("a", "b", "c"):
        one.publish(key, Totals(5, 6, 7), Levels(5, 6), 0.0)
    assert [other.others(key) for key in ("a", "b", "c")] == [Totals(5, 6, 7), Totals(5, 6, 7), Totals()]
    assert other.others("a") == Totals(0, 0, 7), "only what is new"


def test_accounts_refuse_with_the_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    rules = KeyRules((KeySettings("a", requests_per_minute=2), KeySettings("*", streams=1)))
    accounts = Accounts(rules)
    for _ in range(2):
        assert accounts.claim("a", 10, 10, 1) is not None
    with pytest.raises(LimitReached) as found:
        accounts.claim("a", 10, 10, 1)
    assert (found.value.status, found.value.retry_after, found.value.limit) == (429, 30, "requests_per_minute")
    assert found.value.message == "the API key 'a' has sent its 2 requests per minute; try again in 30 s"
    claim = accounts.claim("b", 10, 10, 1)
    assert claim is not None
    with pytest.raises(LimitReached):
        accounts.claim("b", 10, 10, 1)
    assert accounts.claim("c", 10, 10, 1) is not None, "the entry * is for each key, not for all of them together"
    accounts.settle(claim, 5)
    assert accounts.claim("b", 10, 10, 1) is not None
    with pytest.raises(ApiError) as never:
        accounts.claim("d", 10, 10, 2)
    assert never.value.status == 400
    accounts.follow(KeyRules())
    assert accounts.claim("b", 10, 10, 50) is not None
    assert Accounts(KeyRules()).claim("a", 1, 1, 1) is None
    assert accounts.headers("unlimited") == []
