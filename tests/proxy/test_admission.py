from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.proxy.admission import Admission, Outlook, Refusal, Waiter


def admission(max_queue: int = 4, by_slo: bool = False, ttft_s: float = 2.0) -> Admission:
    return Admission(max_queue, 60.0, ttft_s, 0.1, by_slo)


def ask(books: Admission, key: str = "-", priority: int = 0, seats: int | None = 1, ttft_s: float = 0.0) -> Waiter:
    found = books.ask(key, priority, Outlook(seats, ttft_s), 0.0)
    assert isinstance(found, Waiter)
    return found


def order(books: Admission, seats: int = 1) -> list[str]:
    keys = []
    while True:
        books.done(0.0, None)
        waiter = books.next(Outlook(seats, 0.0))
        if waiter is None:
            return keys
        keys.append(waiter.key)


def test_seats_then_queue_then_refusal() -> None:
    books = admission()
    granted = [ask(books, seats=4).granted for _ in range(9)]
    assert granted == [True] * 5 + [False] * 4, "a quarter more than the seats, so that none stays empty"
    refused = books.ask("-", 0, Outlook(4, 0.0), 0.0)
    assert isinstance(refused, Refusal)
    assert refused.reason == "queue"
    assert refused.retry_after_s >= 1


def test_without_known_seats_nobody_waits() -> None:
    books = admission()
    assert all(ask(books, seats=None).granted for _ in range(5000))


def test_keys_take_turns_whatever_one_of_them_floods() -> None:
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books)
    for _ in range(10):
        ask(books, "flood")
    ask(books, "single")
    ask(books, "other")
    assert order(books)[:3] == ["flood", "single", "other"]


def test_lower_priority_numbers_first() -> None:
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books)
    for key, priority in (("late", 5), ("normal", 0), ("urgent", -1)):
        ask(books, key, priority)
    assert order(books) == ["urgent", "normal", "late"]


def test_what_would_miss_the_first_tokens_target_is_refused_with_the_time_to_come_back() -> None:
    books = admission(by_slo=True)
    refused = books.ask("-", 0, Outlook(8, 5.5), 0.0)
    assert refused == Refusal("ttft", 5)
    assert isinstance(admission(by_slo=False).ask("-", 0, Outlook(8, 5.5), 0.0), Waiter)


def test_a_queue_that_moves_too_slowly_refuses_at_once() -> None:
    books = admission(max_queue=100, by_slo=True)
    for at in range(40):
        ask(books, seats=None)
        books.done(at * 0.1, 0.05)
    assert books.done_per_s == pytest.approx(10, rel=0.3)
    for _ in range(2):
        ask(books)
    waited = 0
    while isinstance(books.ask("-", 0, Outlook(1, 0.0), 0.0), Waiter):
        waited += 1
    assert 7 <= waited <= 30, "two seconds' worth at ten a second"


def test_seats_follow_the_time_per_token() -> None:
    books = admission(max_queue=0, by_slo=True)
    for _ in range(20):
        ask(books, seats=None)
    books.done(0.0, 0.5)
    assert books.limit == pytest.approx(18)
    books.done(0.1, 0.5)
    assert books.limit == pytest.approx(18), "the effect of one step is waited for"
    for _ in range(200):
        books.done(5.0, 0.01)
        ask(books, seats=100)
    assert books.limit > 19


def test_no_room_for_kv_waits_unless_nothing_else_runs() -> None:
    books = admission()
    assert isinstance(books.ask("-", 0, Outlook(9, 0.0, kv_room=False), 0.0), Waiter)
    second = books.ask("-", 0, Outlook(9, 0.0, kv_room=False), 0.0)
    assert isinstance(second, Waiter)
    assert not second.granted
    assert books.next(Outlook(9, 0.0, kv_room=False)) is None
    assert books.next(Outlook(9, 0.0)) is second


class Books(RuleBasedStateMachine):
    """Any order of calls keeps the books."""

    def __init__(self) -> None:
        super().__init__()
        self.books = admission(max_queue=6)
        self.waiting: list[Waiter] = []
        self.now = 0.0

    @rule(key=st.sampled_from("abc"), priority=st.integers(0, 2), seats=st.integers(1, 3))
    def ask(self, key: str, priority: int, seats: int) -> None:
        found = self.books.ask(key, priority, Outlook(seats, 0.0), self.now)
        if isinstance(found, Refusal):
            assert len(self.waiting) == 6
        elif not found.granted:
            self.waiting.append(found)

    @rule(seats=st.integers(1, 3))
    def next(self, seats: int) -> None:
        found = self.books.next(Outlook(seats, 0.0))
        if found is not None:
            assert found.priority == min(waiter.priority for waiter in self.waiting)
            self.waiting.remove(found)

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0, 9))
    def leave(self, index: int) -> None:
        self.books.leave(self.waiting.pop(index % len(self.waiting)))

    @precondition(lambda self: self.books.running)
    @rule(seconds=st.floats(0, 3))
    def done(self, seconds: float) -> None:
        self.now += seconds
        self.books.done(self.now, 0.05)

    @invariant()
    def hold(self) -> None:
        self.books.audit()
        assert self.books.waiting == len(self.waiting)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
