from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.request.admission import Admission, Refusal
from pdctl.proxy.shares import fair_queue
from pdctl.proxy.shares.fair_queue import FairQueue, Waiter, Work
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy_wire import KeySettings


class Desk(Admission):
    """Admission that remembers whom it let in, so that tests can end the oldest sequence of a key."""

    inside: list[Waiter]

    def ask(
        self,
        name: str,
        priority: int,
        outlook: Outlook,
        now: float,
        max_tokens: int | None = None,
        is_more: bool = False,
    ) -> Waiter | Refusal:
        found = super().ask(name, priority, outlook, now, max_tokens, is_more)
        if isinstance(found, Waiter) and found.granted:
            self.inside.append(found)
        return found

    def next(self, outlook: Outlook, now: float = 0.0) -> Waiter | None:
        found = super().next(outlook, now)
        if found is not None:
            self.inside.append(found)
        return found

    def end(self, now: float, tpot_s: float | None, key: str = "-", actual: Work | None = None) -> None:
        """The oldest sequence of a key has ended."""
        waiter = next(waiter for waiter in self.inside if waiter.key == key)
        self.inside.remove(waiter)
        self.done(waiter, now, tpot_s, actual)


def admission(
    max_queue: int = 4, by_slo: bool = False, ttft_s: float = 2.0, keys: tuple[KeySettings, ...] = ()
) -> Desk:
    made = Desk(max_queue, 60.0, ttft_s, 0.1, by_slo, queue=FairQueue(KeyRules(keys)))
    made.inside = []
    return made


def ask(books: Desk, key: str = "-", priority: int = 0, seats: int | None = 1, ttft_s: float = 0.0) -> Waiter:
    found = books.ask(key, priority, Outlook(seats, ttft_s), 0.0)
    assert isinstance(found, Waiter)
    return found


def order(books: Desk, seats: int = 1) -> list[str]:
    """Keys in the order of admission, each finished before the next; by default, running ones are finished first."""
    keys: list[str] = []
    while books.running or not keys:
        books.end(0.0, None, books.inside[0].key)
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


def test_lower_priority_numbers_first_among_the_requests_of_a_key() -> None:
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books)
    waiting = [ask(books, "a", priority) for priority in (5, 0, -1, 0)]
    ask(books, "b", 9)
    books.end(0.0, None)
    books.end(0.0, None)
    books.running = 0
    found = [books.queue.head(books.queue.state("a"))]
    for _ in range(3):
        books.queue.remove(found[-1])
        found.append(books.queue.head(books.queue.state("a")))
    assert found == [waiting[number] for number in (2, 1, 3, 0)]


def test_a_requests_priority_counts_for_nothing_against_other_keys() -> None:
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books)
    for _ in range(4):
        ask(books, "pushy", priority=-1000)
        ask(books, "modest", priority=5)
    assert Counter(order(books)[:4]) == {"pushy": 2, "modest": 2}


def test_a_class_goes_first_and_those_behind_it_get_an_eighth() -> None:
    keys = KeySettings("urgent", priority=-1), KeySettings("batch", priority=3)
    books = admission(max_queue=1000, keys=keys)
    for _ in range(2):
        ask(books)
    for _ in range(200):
        for name in ("urgent", "normal", "batch"):
            ask(books, name)
    served = order(books)
    assert served[0] == "urgent"
    first = Counter(served[:160])
    assert first["urgent"] == pytest.approx(140, abs=2)
    assert first["normal"] == pytest.approx(17, abs=2)
    assert first["batch"] >= 2


def test_a_single_request_is_not_refused_for_the_queue_of_another_key() -> None:
    books = admission(max_queue=100, by_slo=True)
    books.done_per_s = 10.0
    for _ in range(2):
        ask(books)
    while isinstance(books.ask("flood", 0, Outlook(1, 0.0), 0.0), Waiter):
        pass
    assert isinstance(books.ask("single", 0, Outlook(1, 0.0), 0.0), Waiter), "only one of the flood goes first"


def test_prompts_stay_here_while_the_engines_have_enough_of_them() -> None:
    books = admission(max_queue=100)
    outlook = Outlook(16, 0.0, tokens=300.0, prompts=1024.0, prefills=1)
    assert isinstance(books.ask("other", 0, outlook, 0.0), Waiter)
    flood = [books.ask("flood", 0, outlook, 0.0) for _ in range(8)]
    granted = [waiter for waiter in flood if isinstance(waiter, Waiter) and waiter.granted]
    assert len(granted) == 3, "1200 tokens at the engines"
    assert [waiter.order for waiter in granted] == [0, 1, 1]
    single = books.ask("single", 0, outlook, 0.0)
    assert isinstance(single, Waiter)
    assert (single.granted, single.order) == (True, 0), "it has no prompt there yet"
    books.prefilled(granted[0])
    books.prefilled(granted[1])
    assert books.next(outlook) is not None
    assert books.next(outlook) is None
    books.audit()


def test_alone_a_key_sends_all_prompts_at_once() -> None:
    books = admission(max_queue=100)
    outlook = Outlook(16, 0.0, tokens=300.0, prompts=1024.0, prefills=1)
    assert isinstance(books.ask("other", 0, outlook, 0.0), Waiter)
    granted = [books.ask("flood", 0, outlook, 301.0) for _ in range(16)]
    assert all(isinstance(waiter, Waiter) and waiter.granted for waiter in granted)


def test_what_would_miss_the_first_tokens_target_is_refused_with_the_time_to_come_back() -> None:
    books = admission(by_slo=True)
    refused = books.ask("-", 0, Outlook(8, 5.5), 0.0)
    assert refused == Refusal("ttft", 5)
    assert isinstance(admission(by_slo=False).ask("-", 0, Outlook(8, 5.5), 0.0), Waiter)


def test_a_queue_that_moves_too_slowly_refuses_at_once() -> None:
    books = admission(max_queue=100, by_slo=True)
    for at in range(40):
        ask(books, seats=None)
        books.end(at * 0.1, 0.05)
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
    books.end(0.0, 0.5)
    assert books.limit == pytest.approx(18)
    books.end(0.1, 0.5)
    assert books.limit == pytest.approx(18), "the next step waits for the effect of the last one"
    for _ in range(200):
        books.end(5.0, 0.01)
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
    assert len(granted) == 13
    assert books.waiting == 0, "further sequences do not count as requests"
    single = books.ask("single", 0, outlook, 0.0)
    assert isinstance(single, Waiter)
    assert single.granted, "another key gets a seat, whatever is queued before it"
    assert books.next(outlook) is None
    books.end(0.0, None, "flood")
    assert books.next(outlook) is None, "the two others still have seats of the last eighth"
    books.end(0.0, None, "flood")
    assert (found := books.next(outlook)) is not None
    assert found.key == "flood"
    # No other key has sent a request for a while: it may have all seats.
    books.end(300.0, None, "other")
    books.end(300.0, None, "single")
    while books.next(outlook, 300.0) is not None:
        pass
    assert books.running == 20
    books.audit()


def test_a_key_with_long_prompts_takes_its_turns_less_often() -> None:
    books = admission(max_queue=1000)
    for _ in range(2):
        ask(books)
    for _ in range(30):
        books.ask("long", 0, Outlook(1, 0.0, tokens=400.0), 0.0, max_tokens=10)
        books.ask("short", 0, Outlook(1, 0.0, tokens=80.0), 0.0, max_tokens=10)
    first = order(books)[:20]
    assert 3 <= first.count("long") <= 6


def test_idleness_saves_nothing_up() -> None:
    books = admission(max_queue=1000)
    for _ in range(2):
        ask(books)
    for _ in range(40):
        ask(books, "busy")
    for _ in range(30):
        books.end(0.0, None, books.inside[0].key)
        books.next(Outlook(1, 0.0))
    for _ in range(10):
        ask(books, "new")
    assert order(books)[:6].count("new") <= 4


def test_other_rules_leave_who_runs_and_who_waits() -> None:
    books = admission(max_queue=1, by_slo=True)
    for _ in range(3):
        ask(books)
    books.end(0.0, 0.5)
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
    books.end(0.0, None)
    for at in (0.5, 1.0, 1.5, 2.0):
        ask(books, seats=None)
        books.end(at, None)
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
        books.end(at, None)
    assert books.done_per_s == pytest.approx(2.0)


def test_one_seat_is_always_left() -> None:
    books = admission(max_queue=0, by_slo=True)
    for at in range(50):
        ask(books, seats=None)
        books.end(2.0 * at, 9.0)
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
    monkeypatch.setattr(fair_queue, "_MAX_KEYS", 8)
    books = admission(max_queue=100)
    for _ in range(2):
        ask(books, "runs")
    ask(books, "waits")
    for number in range(100):
        books.queue.asks(f"idle{number}", float(number))
        assert len(books.queue.states()) <= 8
        books.audit()
    assert {"runs", "waits", "idle99", "idle98"} <= set(books.queue.states()), "the most recently used ones are kept"
    books.end(0.0, None, "runs")
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


SIZES = st.lists(st.floats(0.0, 20_000.0), min_size=20, max_size=20)


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
            books.ask(key, 0, Outlook(1, 0.0, tokens=size), 0.0, max_tokens=10)
    given_to = dict.fromkeys("abc", 0.0)
    left = dict.fromkeys("abc", 20)
    most = 20.0 + max(map(max, sizes))
    while all(left.values()):
        books.end(0.0, None, books.inside[0].key)
        waiter = books.next(Outlook(1, 0.0))
        assert waiter is not None
        left[waiter.key] -= 1
        given_to[waiter.key] += waiter.work.cost
        assert max(given_to.values()) - min(given_to.values()) <= most + 1e-6


KEYS = (
    KeySettings("a", weight=4.0),
    KeySettings("b", weight=0.5, priority=1),
    KeySettings("c", priority=-1),
)
SETTINGS = st.builds(KeySettings, st.sampled_from("abcd"), st.floats(0.1, 10), priority=st.integers(0, 2))
WORKS = st.builds(Work, st.floats(0, 1e5), st.floats(0, 1e4))


class Books(RuleBasedStateMachine):
    """The counts are consistent after any order of calls, and a seat that somebody may have is not left empty."""

    def __init__(self) -> None:
        super().__init__()
        self.books = admission(max_queue=6, keys=KEYS)
        self.waiting: list[Waiter] = []
        self.granted: list[Waiter] = []
        self.now = 0.0

    @rule(
        key=st.sampled_from("abcd"),
        priority=st.integers(0, 2),
        seats=st.integers(1, 9),
        tokens=st.floats(0, 2000),
        max_tokens=st.none() | st.integers(1, 500),
        more=st.booleans(),
    )
    def ask(self, key: str, priority: int, seats: int, tokens: float, max_tokens: int | None, more: bool) -> None:
        before = Counter(waiter.key for waiter in self.waiting if not waiter.is_more)
        outlook = Outlook(seats, 0.0, tokens=tokens, prompts=600.0, prefills=1)
        found = self.books.ask(key, priority, outlook, self.now, max_tokens, is_more=more)
        out = [waiter for waiter, refusal in self.books.take_pushed_out() if refusal.reason == "queue"]
        if isinstance(found, Refusal):
            assert not more
            assert before.total() == 6
            assert not out
            return
        (self.granted if found.granted else self.waiting).append(found)
        for waiter in out:
            assert waiter.pushed_out
            assert waiter.key != key
            assert not waiter.is_more
            weight = {"a": 4.0, "b": 0.5}
            assert before[waiter.key] / weight.get(waiter.key, 1.0) > (before[key] + 1) / weight.get(key, 1.0)
            self.waiting.remove(waiter)
            self.books.leave(waiter)

    @rule(seats=st.integers(1, 9))
    def next(self, seats: int) -> None:
        found = self.books.next(Outlook(seats, 0.0), self.now)
        if found is None:
            # One eighth of the seats is kept for keys that have less than their share.
            several = len(self.books.queue.states()) > 1
            assert not self.waiting or self.books.running >= seats - (math.ceil(seats / 8) if several else 0)
            return
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
    @rule(index=st.integers(0, 9))
    def first_token(self, index: int) -> None:
        waiter = self.granted[index % len(self.granted)]
        self.books.prefilled(waiter)
        assert not waiter.in_prompt

    @precondition(lambda self: self.granted)
    @rule(seconds=st.floats(0, 20), index=st.integers(0, 9), actual=st.none() | WORKS)
    def done(self, seconds: float, index: int, actual: Work | None) -> None:
        self.now += seconds
        self.books.done(self.granted.pop(index % len(self.granted)), self.now, 0.05, actual)

    @rule(keys=st.lists(SETTINGS))
    def reload(self, keys: list[KeySettings]) -> None:
        self.books.queue.follow(KeyRules(keys))
        self.books.audit()
        self.books.queue.follow(KeyRules(KEYS))

    @invariant()
    def hold(self) -> None:
        self.books.audit()
        assert self.books.waiting == sum(not waiter.is_more for waiter in self.waiting)
        assert self.books.running == len(self.granted)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=40)
