from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.request import admission as module
from pdctl.proxy.request.admission import Admission, Refusal, Waiter


def admission(max_queue: int = 4, by_slo: bool = False, ttft_s: float = 2.0) -> Admission:
    return Admission(max_queue, 60.0, ttft_s, 0.1, by_slo)


def ask(books: Admission, key: str = "-", priority: int = 0, seats: int | None = 1, ttft_s: float = 0.0) -> Waiter:
    found = books.ask(key, priority, Outlook(seats, ttft_s), 0.0)
    assert isinstance(found, Waiter)
    return found


def order(books: Admission, seats: int = 1) -> list[str]:
    """Keys in the order of admission, each finished before the next; by default, running ones are finished first."""
    keys: list[str] = []
    while books.running or not keys:
        books.done(0.0, None, next(name for name, key in books._keys.items() if key.running))
        while (waiter := books.next(Outlook(seats, 0.0))) is not None:
            keys.append(waiter.key)
    books.audit()
    return keys


def test_seats_then_queue_then_refusal() -> None:
    books = admission()
    granted = [ask(books, seats=4).granted for _ in range(9)]
    assert granted == [True] * 5 + [False] * 4, "a quarter more than the seats, so no seat stays empty"
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
    assert 7 <= waited <= 30, "two seconds of work at ten per second"


def test_seats_follow_the_time_per_token() -> None:
    books = admission(max_queue=0, by_slo=True)
    for _ in range(20):
        ask(books, seats=None)
    books.done(0.0, 0.5)
    assert books.limit == pytest.approx(18)
    books.done(0.1, 0.5)
    assert books.limit == pytest.approx(18), "the next step waits for the effect of the last one"
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


def test_sequences_take_seats_one_by_one_and_the_last_eighth_is_left_to_others() -> None:
    books = admission(max_queue=100)
    ask(books, "other")
    outlook = Outlook(16, 0.0)
    flood = [books.ask("flood", 0, outlook, 0.0, is_more=number > 0) for number in range(64)]
    granted = [waiter for waiter in flood if isinstance(waiter, Waiter) and waiter.granted]
    assert len(granted) == 14
    assert books.waiting == 0, "further sequences do not count as requests"
    single = books.ask("single", 0, outlook, 0.0)
    assert isinstance(single, Waiter)
    assert single.granted, "another key gets a seat, whatever is queued before it"
    assert books.next(outlook) is None
    books.done(0.0, None, "flood")
    assert (found := books.next(outlook)) is not None
    assert found.key == "flood"
    # No other key has sent a request for a while: it may have all seats.
    books.done(60.0, None, "other")
    books.done(60.0, None, "single")
    while books.next(outlook, 60.0) is not None:
        pass
    assert books.running == 20
    books.audit()


def test_a_key_with_long_prompts_takes_its_turns_less_often() -> None:
    books = admission(max_queue=1000)
    for _ in range(2):
        ask(books)
    for _ in range(30):
        books.ask("long", 0, Outlook(1, 0.0), 0.0, size=3 * 4096.0)
        books.ask("short", 0, Outlook(1, 0.0), 0.0)
    first = order(books)[:20]
    assert 3 <= first.count("long") <= 6


def test_idleness_saves_nothing_up() -> None:
    books = admission(max_queue=1000)
    for _ in range(2):
        ask(books)
    for _ in range(40):
        ask(books, "busy")
    for _ in range(30):
        books.done(0.0, None, "-" if books._keys["-"].running else "busy")
        books.next(Outlook(1, 0.0))
    for _ in range(10):
        ask(books, "new")
    assert order(books)[:6].count("new") <= 4


def test_other_rules_leave_who_runs_and_who_waits() -> None:
    books = admission(max_queue=1, by_slo=True)
    for _ in range(3):
        ask(books)
    books.done(0.0, 0.5)
    assert (books.running, books.waiting) == (1, 1)
    assert books.limit < 2
    before = books.limit
    books.follow(Admission(2, 9.0, 3.0, 0.2, by_slo=True))
    assert (books.max_queue, books.patience_s, books.ttft_s, books.tpot_s) == (2, 9.0, 3.0, 0.2)
    assert (books.running, books.waiting, books.limit) == (1, 1, before)
    assert not ask(books).granted, "the queue has room for one more"
    books.follow(Admission(2, 9.0, 3.0, 0.2, by_slo=False))
    assert books.next(Outlook(1, 0.0)) is not None, "the number of seats is the engines' again"
    books.audit()


def test_a_full_queue_tells_when_its_turn_would_come() -> None:
    books = admission(max_queue=3)
    ask(books, seats=None)
    books.done(0.0, None)
    for at in (0.5, 1.0, 1.5, 2.0):
        ask(books, seats=None)
        books.done(at, None)
    assert books.done_per_s == pytest.approx(2.5)
    for _ in range(5):
        ask(books)
    assert books.ask("-", 0, Outlook(1, 0.0), 2.0) == Refusal("queue", 2), "four at 2.5 per second"
    books.done_per_s = 0.001
    assert books.ask("-", 0, Outlook(1, 0.0), 2.0) == Refusal("queue", 60), "Retry-After is limited"


def test_a_long_silence_says_nothing_about_the_pace() -> None:
    books = admission()
    for at in (0.0, 1.0, 500.0, 500.5):
        ask(books, seats=None)
        books.done(at, None)
    assert books.done_per_s == pytest.approx(2.0)


def test_one_seat_is_always_left() -> None:
    books = admission(max_queue=0, by_slo=True)
    for at in range(50):
        ask(books, seats=None)
        books.done(2.0 * at, 9.0)
    assert books.limit == 1.0
    assert ask(books, seats=None).granted
    assert isinstance(books.ask("-", 0, Outlook(None, 0.0), 100.0), Refusal)


@pytest.mark.parametrize(
    ("tpot_s", "by_slo", "change"),
    [(0.081, True, -1), (0.079, True, 0), (0.066, True, 0), (0.064, True, 1), (0.5, False, 0), (0.01, False, 0)],
)
def test_seats_change_outside_a_band_below_the_target(tpot_s: float, by_slo: bool, change: int) -> None:
    books = admission(max_queue=0, by_slo=by_slo)
    books.limit = 10.0
    for _ in range(9):
        ask(books, seats=None)
    books.measured(5.0, tpot_s)
    assert (books.limit > 10.0) - (books.limit < 10.0) == change


def test_seats_that_nobody_takes_are_not_added_to() -> None:
    books = admission(by_slo=True)
    books.limit = 10.0
    ask(books, seats=None)
    books.measured(5.0, 0.01)
    assert books.limit == 10.0


def test_few_keys_are_remembered_and_none_that_has_something_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_KEYS", 8)
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books, "runs")
    ask(books, "waits")
    for number in range(100):
        books._known(f"idle{number}", float(number))
        assert len(books._keys) <= 8
        books.audit()
    assert {"runs", "waits", "idle99", "idle98"} <= set(books._keys), "the most recently used ones are kept"
    books.done(0.0, None, "runs")
    assert (found := books.next(Outlook(1, 0.0))) is not None
    assert found.key == "waits"


def test_a_waiter_that_was_granted_has_left_the_queue() -> None:
    books = admission()
    granted = ask(books)
    ask(books)
    waiting = ask(books)
    books.leave(granted)
    assert (books.running, books.waiting) == (2, 1)
    books.leave(waiting)
    assert (books.running, books.waiting, books.has_waiters) == (2, 0, False)
    books.audit()


SIZES = st.lists(st.floats(0.0, 20 * 4096.0), min_size=20, max_size=20)


@given(st.tuples(SIZES, SIZES, SIZES))
def test_keys_that_always_wait_are_given_the_same_within_one_request(
    sizes: tuple[list[float], list[float], list[float]],
) -> None:
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books)
    wanted = dict(zip("abc", sizes, strict=True))
    for key, each in wanted.items():
        for size in each:
            books.ask(key, 0, Outlook(1, 0.0), 0.0, size)
    given_to = dict.fromkeys("abc", 0.0)
    left = dict.fromkeys("abc", 20)
    running = ["-", "-"]
    most = 1.0 + max(map(max, sizes)) / 4096.0
    while all(left.values()):
        books.done(0.0, None, running.pop(0))
        waiter = books.next(Outlook(1, 0.0))
        assert waiter is not None
        running.append(waiter.key)
        left[waiter.key] -= 1
        given_to[waiter.key] += waiter.cost
        assert max(given_to.values()) - min(given_to.values()) <= most + 1e-6


class Books(RuleBasedStateMachine):
    """The counts are consistent after any order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.books = admission(max_queue=6)
        self.waiting: list[Waiter] = []
        self.granted: list[Waiter] = []
        self.now = 0.0

    @rule(key=st.sampled_from("abc"), priority=st.integers(0, 2), seats=st.integers(1, 9), more=st.booleans())
    def ask(self, key: str, priority: int, seats: int, more: bool) -> None:
        found = self.books.ask(key, priority, Outlook(seats, 0.0), self.now, is_more=more)
        if isinstance(found, Refusal):
            assert not more
            assert sum(not waiter.is_more for waiter in self.waiting) == 6
        else:
            (self.granted if found.granted else self.waiting).append(found)

    @rule(seats=st.integers(1, 9))
    def next(self, seats: int) -> None:
        found = self.books.next(Outlook(seats, 0.0), self.now)
        if found is not None:
            same = [waiter for waiter in self.waiting if waiter.key == found.key]
            assert found.priority == min(waiter.priority for waiter in same)
            assert self.books.running <= self.books.seats(Outlook(seats, 0.0))
            self.waiting.remove(found)
            self.granted.append(found)

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0, 9))
    def leave(self, index: int) -> None:
        self.books.leave(self.waiting.pop(index % len(self.waiting)))

    @precondition(lambda self: self.granted)
    @rule(seconds=st.floats(0, 20), index=st.integers(0, 9))
    def done(self, seconds: float, index: int) -> None:
        self.now += seconds
        waiter = self.granted.pop(index % len(self.granted))
        self.books.done(self.now, 0.05, waiter.key)

    @invariant()
    def hold(self) -> None:
        self.books.audit()
        assert self.books.waiting == sum(not waiter.is_more for waiter in self.waiting)
        assert self.books.running == len(self.granted)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=40)
