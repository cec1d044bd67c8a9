"""The door executes admission's decisions: waiting requests are woken, refused or give up, and no seat is lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.request import door as module
from pdctl.proxy.request.admission import Admission
from pdctl.proxy.request.door import AdmissionDoor
from pdctl.proxy.shares.fair_queue import Waiter
from pdctl.proxy.telemetry.metrics import Metrics


class Hall:
    """A door, with `outlook` as the current state of the engines."""

    def __init__(self, max_queue: int = 4, patience_s: float = 600.0, by_slo: bool = False) -> None:
        self.outlook = Outlook(1, 0.0)
        self.metrics = Metrics("m", 1.0, 1.0)
        self.books = Admission(max_queue, patience_s, 2.0, 0.1, by_slo)
        self.asked: list[tuple[float, int | None]] = []
        self.door = AdmissionDoor(self.books, self._now, self.metrics)
        self.inside: list[Waiter] = []

    def _now(self, size: float, max_tokens: int | None) -> Outlook:
        self.asked.append((size, max_tokens))
        return self.outlook

    @property
    def sheds(self) -> dict[str, float]:
        """Refusals by reason."""
        return {labels[0]: count for (name, labels), count in self.metrics.counters.values.items() if name == "sheds"}

    async def full(self) -> None:
        """Take every seat, for the key `-`."""
        for _ in range(self.books.seats(self.outlook)):
            await self.enter()

    async def enter(self, key: str = "-", is_more: bool = False) -> None:
        """Wait for a seat."""
        self.inside.append(await self.door.enter(key, 0, 5.0, 8, is_more))

    def leave(self, tpot_s: float | None = None, key: str = "-") -> None:
        """The oldest sequence of a key ends."""
        waiter = next(waiter for waiter in self.inside if waiter.key == key)
        self.inside.remove(waiter)
        self.door.leave(waiter, tpot_s)

    async def waiter(self, key: str = "-", is_more: bool = False) -> asyncio.Task[None]:
        """A sequence that has to wait at the door."""
        task = asyncio.ensure_future(self.enter(key, is_more))
        await asyncio.sleep(0)
        assert not task.done()
        return task


async def refused(hall: Hall) -> ApiError:
    with pytest.raises(ApiError) as found:
        await hall.enter()
    assert (found.value.status, found.value.kind) == (429, "rate_limit_exceeded")
    assert found.value.message.endswith(f"try again in {found.value.retry_after} s")
    return found.value


def test_who_waits_goes_on_when_a_seat_comes_free_and_in_order() -> None:
    async def main() -> None:
        hall = Hall()
        await hall.full()
        assert hall.asked == [(5.0, 8)] * 2
        first, second = await hall.waiter(), await hall.waiter()
        assert hall.door.waiting == 2
        hall.leave()
        await first
        assert not second.done()
        hall.leave(0.05)
        await second
        assert (hall.books.running, hall.door.waiting) == (2, 0)
        assert not hall.sheds

    asyncio.run(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        hall = Hall(max_queue=0)
        await hall.full()
        assert "too many requests are waiting" in (await refused(hall)).message
        assert hall.sheds == {"queue": 1.0}
        hall.books.audit()

    asyncio.run(main())


def test_what_would_be_late_is_refused_with_the_time_to_come_back() -> None:
    async def main() -> None:
        hall = Hall(by_slo=True)
        hall.outlook = Outlook(8, 5.5)
        failure = await refused(hall)
        assert "the engines are busy" in failure.message
        assert failure.retry_after == 5
        hall.outlook = Outlook(1, 0.0)
        await hall.full()
        hall.books.done_per_s = 0.1
        failure = await refused(hall)
        assert "the first token would come later" in failure.message
        assert hall.sheds == {"ttft": 1.0, "wait": 1.0}

    asyncio.run(main())


def test_patience_ends_and_the_place_is_given_up() -> None:
    async def main() -> None:
        hall = Hall(patience_s=0.0)
        await hall.full()
        assert "no engine had room in time" in (await refused(hall)).message
        assert hall.sheds == {"patience": 1.0}
        assert not hall.books.has_waiters
        hall.leave()
        await hall.enter()
        hall.books.audit()

    asyncio.run(main())


def test_a_key_with_less_takes_a_place_in_a_full_queue() -> None:
    async def main() -> None:
        hall = Hall(max_queue=2)
        await hall.full()
        first, last = await hall.waiter("flood"), await hall.waiter("flood")
        single = await hall.waiter("single")
        with pytest.raises(ApiError) as found:
            await last
        assert (found.value.status, hall.sheds) == (429, {"queue": 1.0})
        assert "too many requests are waiting" in found.value.message
        assert hall.door.waiting == 2
        hall.leave()
        hall.leave()
        await asyncio.gather(first, single)
        assert not hall.door._turns
        hall.books.audit()

    asyncio.run(main())


def test_a_computed_prompt_lets_the_next_one_in() -> None:
    async def main() -> None:
        hall = Hall()
        hall.outlook = Outlook(16, 0.0, tokens=100.0, prompts=100.0, prefills=1)
        await hall.enter("other")
        await hall.enter("flood")
        waiting = await hall.waiter("flood")
        hall.door.prefilled(hall.inside[0])
        await waiting
        hall.books.audit()

    asyncio.run(main())


def test_further_sequences_of_a_request_have_another_patience() -> None:
    async def main() -> None:
        hall = Hall(patience_s=0.0, max_queue=0)
        await hall.full()
        more = await hall.waiter(is_more=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not more.done()
        hall.leave()
        await more

    asyncio.run(main())


def test_a_seat_that_comes_as_patience_ends_is_taken() -> None:
    async def main() -> None:
        hall = Hall(patience_s=0.0)
        await hall.full()
        waiting = await hall.waiter()
        hall.leave()  # before the loop handles the timeout
        await waiting
        assert hall.books.running == 2
        assert not hall.sheds

    asyncio.run(main())


def test_a_client_that_leaves_while_it_waits_costs_nobody_a_seat() -> None:
    async def main() -> None:
        hall = Hall()
        await hall.full()
        leaves, stays = await hall.waiter("a"), await hall.waiter("b")
        leaves.cancel()
        await asyncio.wait([leaves])
        assert leaves.cancelled()
        assert hall.door.waiting == 1
        hall.leave()
        await stays
        assert hall.books.running == 2

    asyncio.run(main())


def test_a_client_that_leaves_as_its_seat_comes_hands_it_to_the_next() -> None:
    async def main() -> None:
        hall = Hall()
        await hall.full()
        leaves, stays = await hall.waiter("a"), await hall.waiter("b")
        hall.leave()
        leaves.cancel()
        await stays
        assert leaves.cancelled()
        assert hall.books.running == 2
        hall.books.audit()

    asyncio.run(main())


def test_a_seat_that_comes_as_its_client_leaves_goes_to_the_next() -> None:
    async def main() -> None:
        hall = Hall()
        await hall.full()
        leaves, stays = await hall.waiter("a"), await hall.waiter("b")
        leaves.cancel()  # it is still in the queue: no other task has run since
        hall.leave()
        await stays
        assert leaves.cancelled()
        assert hall.books.running == 2
        hall.books.audit()

    asyncio.run(main())


def test_one_end_may_let_several_in() -> None:
    async def main() -> None:
        hall = Hall()
        await hall.full()
        waiting = [await hall.waiter() for _ in range(3)]
        hall.outlook = Outlook(8, 0.0)
        hall.leave()
        await asyncio.gather(*waiting)
        assert hall.books.running == 4

    asyncio.run(main())


def test_the_queue_moves_on_when_engines_have_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        hall = Hall()
        await hall.enter()
        hall.outlook = Outlook(8, 0.0, kv_room=False)
        waiting = await hall.waiter()
        looking = asyncio.ensure_future(hall.door.run_forever())
        hall.asked.clear()
        while not hall.asked:
            await asyncio.sleep(0)
        assert not waiting.done()
        hall.outlook = Outlook(8, 0.0)
        await waiting
        looking.cancel()

    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    asyncio.run(main())


def test_what_was_measured_changes_the_seats() -> None:
    hall = Hall(by_slo=True)
    hall.door.measured(9.0)
    assert hall.books.limit == 1.0
    other = Hall(by_slo=True)

    async def answered() -> None:
        await other.enter()
        other.leave(9.0)

    asyncio.run(answered())
    assert other.books.limit == 1.0


@dataclass(eq=False)
class Guest:
    """One sequence, from its arrival to its end."""

    entering: asyncio.Task[Waiter]

    @property
    def is_in(self) -> bool:
        return self.entering.done() and not self.entering.cancelled() and self.entering.exception() is None


class Door(RuleBasedStateMachine):
    """Clients arrive, leave while they wait or when they are done, and engines come and go. No seat is lost or
    duplicated, and no client waits while a seat is free."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "_LOOK_S", 0.0)
        self.runner = asyncio.Runner()
        self.hall = Hall(max_queue=3)
        self.guests: list[Guest] = []
        self.looking = self.runner.run(self._begin())

    async def _begin(self) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.hall.door.run_forever())

    def teardown(self) -> None:
        self.runner.close()
        self.patch.undo()

    def _settle(self) -> None:
        async def turns() -> None:
            for _ in range(8):
                await asyncio.sleep(0)

        self.runner.run(turns())
        for guest in list(self.guests):
            if guest.entering.done() and not guest.is_in:
                self.guests.remove(guest)

    @rule(is_more=st.booleans())
    def come(self, is_more: bool) -> None:
        async def begin() -> Guest:
            return Guest(asyncio.ensure_future(self.hall.door.enter("a", 0, 5.0, 8, is_more)))

        self.guests.append(self.runner.run(begin()))
        self._settle()

    @precondition(lambda self: self.guests)
    @rule(index=st.integers(0, 9), at_once=st.booleans())
    def leave(self, index: int, at_once: bool) -> None:
        """A client leaves. `at_once`: while a seat is being granted to a waiter."""
        guest = self.guests[index % len(self.guests)]
        if at_once and (inside := next((found for found in self.guests if found.is_in), None)) not in (None, guest):
            assert inside is not None
            self.guests.remove(inside)
            self.hall.door.leave(inside.entering.result(), None)
        if guest.is_in:
            self.guests.remove(guest)
            self.hall.door.leave(guest.entering.result(), None)
        else:
            guest.entering.cancel()
        self._settle()

    @rule(seats=st.integers(1, 4))
    def change(self, seats: int) -> None:
        self.hall.outlook = Outlook(seats, 0.0)
        self._settle()

    @invariant()
    def hold(self) -> None:
        books = self.hall.books
        books.audit()
        inside = sum(guest.is_in for guest in self.guests)
        assert books.running == inside
        waiting = len(self.guests) - inside
        assert bool(waiting) == books.has_waiters
        assert len(self.hall.door._turns) == waiting, "waiters that have left are removed"
        assert not waiting or books.running >= books.seats(self.hall.outlook), "a seat is free, but a sequence waits"


TestDoor = Door.TestCase
TestDoor.settings = settings(max_examples=60, stateful_step_count=30)
