"""Shares of keys that always want more, on a server that takes one sequence after the other."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.proxy.shares import fair_queue
from pdctl.proxy.shares.fair_queue import FairQueue, KeyState, Waiter, Work
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy_wire import KeySettings


@dataclass
class Server:
    """Serves one sequence at a time. `served`: actual cost by key, divided by its weight."""

    queue: FairQueue
    served: dict[str, float] = field(default_factory=dict)

    def ask(self, key: str, work: Work) -> Waiter:
        self.queue.asks(key, 0.0)
        waiter = Waiter(key, 0, 0.0, work)
        self.queue.push(waiter)
        return waiter

    def serve(self, actual: Work | None = None) -> Waiter:
        key = next(iter(self.queue.in_order()))
        waiter = self.queue.head(key)
        self.queue.remove(waiter)
        self.queue.grant(waiter)
        work = waiter.work if actual is None else actual
        self.queue.settle(waiter, work, answered=True)
        self.served[waiter.key] = self.served.get(waiter.key, 0.0) + work.cost / key.settings.weight
        self.queue.audit()
        return waiter


def server(*keys: KeySettings) -> Server:
    return Server(FairQueue(KeyRules(keys)))


WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 20.0), min_size=2)
WORKS = st.builds(Work, st.floats(0.0, 5000.0), st.floats(0.0, 500.0))


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.data())
def test_keys_that_always_wait_get_their_weights_within_two_sequences(
    weights: dict[str, float], data: st.DataObject
) -> None:
    """The bound of start-time fair queueing, with corrections of wrong predictions."""
    made = server(*(KeySettings(name, weight) for name, weight in weights.items()))
    most = dict.fromkeys(weights, 0.0)
    for name in weights:
        made.ask(name, data.draw(WORKS))
    for _ in range(60):
        predicted, actual = data.draw(WORKS), data.draw(WORKS)
        waiter = made.serve(actual)
        for work in (waiter.work, predicted, actual):
            most[waiter.key] = max(most[waiter.key], work.cost / weights[waiter.key])
        made.ask(waiter.key, predicted)
        first, last = min(weights, key=lambda n: made.served.get(n, 0.0)), max(made.served, key=made.served.__getitem__)
        gap = made.served[last] - made.served.get(first, 0.0)
        assert gap <= most[first] + 2 * most[last] + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.lists(WORKS, min_size=1, max_size=5), WORKS)
def test_nobody_starves_however_much_another_key_sends(flood: int, wanted: list[Work], each: Work) -> None:
    made = server()
    for _ in range(flood):
        made.ask("flood", each)
    for _ in range(min(flood, 10)):
        made.serve()
        made.ask("flood", each)
    for work in wanted:
        made.ask("other", work)
    for work in wanted:
        # The flood gets as much as the other key has got, and one more.
        before = made.served.get("other", 0.0)
        at_most = math.floor((before + work.cost) / each.cost) + 2
        turns = 0
        while made.serve().key != "other":
            made.ask("flood", each)
            turns += 1
            assert turns <= at_most + (before == 0)


def test_idleness_earns_nothing() -> None:
    made = server()
    made.ask("late", Work(1000, 100))
    made.serve()
    made.ask("early", Work(1000, 100))
    for _ in range(50):
        made.ask("early", Work(1000, 100))  # one always waits
        made.serve()
    for _ in range(20):
        made.ask("early", Work(1000, 100))
        made.ask("late", Work(1000, 100))
    first = [made.serve().key for _ in range(20)]
    assert first.count("late") == pytest.approx(10, abs=1)


def test_what_a_key_did_alone_is_not_held_against_it() -> None:
    made = server()
    made.ask("early", Work(100, 10))
    made.serve(Work(100_000, 10_000))
    for _ in range(20):
        made.ask("early", Work(1000, 100))
        made.ask("late", Work(1000, 100))
    first = [made.serve().key for _ in range(20)]
    assert first.count("early") == pytest.approx(10, abs=1)


def test_a_key_is_charged_what_it_used() -> None:
    """Predictions do not help a key whose answers are longer."""
    made = server()
    for _ in range(60):
        made.ask("short", Work(10, 10))
        made.ask("long", Work(10, 10))
    first = [made.serve(Work(10, 10) if made_next(made) == "short" else Work(10, 100)).key for _ in range(60)]
    assert first.count("long") == pytest.approx(60 * 30 / 240, abs=2)


def made_next(made: Server) -> str:
    return made.queue.head(next(iter(made.queue.in_order()))).key


def test_outputs_are_predicted_by_those_of_the_key() -> None:
    made = server()
    for _ in range(200):
        made.ask("wordy", Work(10, 10))
        made.serve(Work(10, 1000))
    key = made.queue.state("wordy")
    assert made.queue.predict(key, 5.0, None).output == pytest.approx(1000, rel=0.01)
    assert made.queue.predict(key, 5.0, 20) == Work(5.0, 20.0)
    assert made.queue.predict(made.queue.state("new"), 5.0, None) == Work(5.0, 64.0)


def test_a_key_that_changes_its_class_takes_its_sequences_along() -> None:
    made = server()
    for name in "ab":
        for _ in range(3):
            made.ask(name, Work(10, 10))
    made.queue.follow(KeyRules((KeySettings("b", 2.0, priority=-1), KeySettings("*", 3.0))))
    made.queue.audit()
    assert made.queue.state("a").settings.weight == 3.0
    assert [made.serve().key for _ in range(3)].count("b") >= 2


def test_many_keys_are_forgotten_when_they_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_MAX_KEYS", 100)
    made = server()
    rng = random.Random(2)
    for number in range(5000):
        made.ask(f"k{number}", Work(1, 1))
        if rng.random() < 0.99:
            made.serve()
    assert len(made.queue.states()) <= 100 + made.queue.waiting


def test_what_goes_before_a_new_sequence_of_a_key() -> None:
    made = server(KeySettings("urgent", priority=-1), KeySettings("heavy", 4.0), KeySettings("last", priority=1))
    for name, count in (("urgent", 5), ("heavy", 50), ("light", 3), ("last", 7)):
        for _ in range(count):
            made.ask(name, Work(1, 1))

    def ahead(name: str) -> float:
        key: KeyState = made.queue.state(name)
        return made.queue.ahead(key)

    assert ahead("light") == 3 + 5 + 16, "its own, those of the class before, and four for each of its own"
    assert ahead("new") == 5 + 1 + 4
    assert ahead("heavy") == 50 + 5 + 3
    assert ahead("last") == 7 + 5 + 50 + 3
