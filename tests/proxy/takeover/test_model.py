"""Journal, kernel and socket, with a death at every step, explored exhaustively.

The proxy writes one streamed answer with the real slot, and may die after each line of it; the kernel takes any number
of the bytes that the proxy has written to the socket, at any time. The next proxy decides with the real `adoptable` and
goes on, and may die as well. Checked: what the client gets is always a beginning of the right answer, and every way
leads to the whole answer."""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import pytest

from pdctl.proxy.takeover import adoption, journal
from pdctl.proxy.takeover.adoption import CannotGoOn, adoptable
from pdctl.proxy.takeover.journal import PAGE, Frame, Slot
from pdctl.proxy.takeover.kernel import Counts
from pdctl.proxy.takeover.notes import Facts, encode_facts

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\n\r\n"
FACTS = encode_facts(Facts("id", 1, 2))
# An earlier answer on the same connection, whose end the kernel may not have when the next one begins.
EARLIER = b"old"
PARTS = (b"<1", b"2", b"3", b"4>")
RIGHT = EARLIER + b"".join(PARTS)
SMALL = {"IN_BYTES": 64, "OUT_BYTES": 16, "NOTE_BYTES": 64, "_OUT_MASK": 15, "SLOT_BYTES": PAGE + 144}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(journal, name, value)
    for name in ("IN_BYTES", "OUT_BYTES"):
        monkeypatch.setattr(adoption, name, SMALL[name])


@dataclass(frozen=True)
class World:
    """`next`: the part that the proxy writes next; `sent`: what was written to the socket and not lost by a death;
    `taken`: bytes of it that the kernel has; `wrong`: what was found."""

    memory: bytes
    next: int = 0
    sent: bytes = EARLIER
    taken: int = 0
    deaths: int = 0
    wrong: str = ""

    @property
    def is_done(self) -> bool:
        return self.next == len(PARTS) and self.taken == len(self.sent)


class Model:
    """`socket_first`: parts are noted after they were written; `miscounted`: how far the kernel's count is off."""

    def __init__(self, socket_first: bool = False, miscounted: int = 0, deaths: int = 2) -> None:
        self.socket_first, self.miscounted, self.deaths = socket_first, miscounted, deaths
        self._written: dict[tuple[bytes, int, int], list[bytes]] = {}

    def first(self) -> World:
        area, slot = slot_of(bytes(2 * PAGE + 144))
        slot.take(1, 0, int)
        slot.room_in(0)[: len(REQUEST)] = REQUEST
        assert slot.change(Frame(read_before=0, answer_at=len(EARLIER)), EARLIER, b"")
        return World(bytes(area))

    def successors(self, world: World) -> Iterator[World]:
        for count in range(1, len(world.sent) - world.taken + 1):
            yield replace(world, taken=world.taken + count)
        if world.next < len(PARTS):
            states = self._write(world)
            done = replace(world, memory=states[-1], next=world.next + 1, sent=world.sent + PARTS[world.next])
            yield done
            if world.deaths < self.deaths:
                # The proxy dies within the part: some of it is noted, or all of it, and then some of it is taken.
                for memory in dict.fromkeys(states):
                    yield self._adopted(replace(world, memory=memory))
                if self.socket_first:
                    for count in range(1, len(done.sent) - world.taken + 1):
                        yield self._adopted(replace(done, memory=world.memory, taken=world.taken + count))
        if world.deaths < self.deaths:
            yield self._adopted(world)

    def _write(self, world: World) -> list[bytes]:
        """The memory after each line of the slot's code."""
        key = (world.memory, world.next, len(world.sent) - world.taken)
        if key not in self._written:
            area, slot = slot_of(world.memory)
            found = slot.load()
            assert found is not None
            slot.resume(found, world.taken, lambda: len(world.sent) - world.taken)
            self._written[key] = traced(area, lambda: written(slot, world.next))
        return self._written[key]

    def _adopted(self, world: World) -> World:
        """The next proxy. What was not taken is lost with the dead one."""
        area, slot = slot_of(world.memory)
        found = slot.load()
        assert found is not None
        at_client = world.sent[: world.taken]
        # Only the last answer ends the request; until then all of it was read.
        counts = Counts(world.taken + self.miscounted, len(REQUEST), open=True)
        try:
            plan = adoptable(slot, found, counts)
        except CannotGoOn as failure:
            return replace(world, wrong=str(failure))
        slot.resume(found, plan.taken, int)
        if plan.forgets:
            slot.forget_output()
        after = plan.resumed.legs[0].token_ids[-1] if plan.resumed else (len(PARTS) if not plan.input else 0)
        return World(bytes(area), after, at_client + plan.unsent, world.taken, world.deaths + 1)


def slot_of(memory: bytes) -> tuple[mmap.mmap, Slot]:
    area = mmap.mmap(-1, len(memory))
    area[:] = memory
    return area, Slot(memoryview(area), 0)


def written(slot: Slot, number: int) -> None:
    """Note a part. Its token's id is the number of the part that follows."""
    data, notes = PARTS[number], b"%d," % (number + 1)
    if number == 0:
        frame = replace(slot.frame, facts=len(FACTS))
        assert slot.change(frame, data, b"P1:0," + notes, FACTS)
    elif number < len(PARTS) - 1:
        assert slot.put(data, notes)
    else:
        assert slot.change(Frame(len(REQUEST), slot.end + len(data)), data, b"")


def traced(area: mmap.mmap, work: Callable[[], None]) -> list[bytes]:
    states = [bytes(area)]

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == journal.__file__:
            if states[-1] != (now := bytes(area)):
                states.append(now)
            return look
        return None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(before)
    states.append(bytes(area))
    return states


def explore(model: Model) -> tuple[int, list[World]]:
    """The number of states, and those that are wrong."""
    first = model.first()
    seen, queue, wrong = {first}, deque([first]), []
    while queue:
        world = queue.popleft()
        if world.wrong or not RIGHT.startswith(world.sent[: world.taken]):
            wrong.append(world)
            continue
        following = list(model.successors(world))
        if not world.is_done and not any(not each.wrong for each in following):
            wrong.append(replace(world, wrong="no way leads on"))
        if world.is_done and world.sent != RIGHT:
            wrong.append(world)
        for each in following:
            if each not in seen:
                seen.add(each)
                queue.append(each)
    return len(seen), wrong


def test_the_client_gets_the_right_answer_wherever_proxies_die() -> None:
    count, wrong = explore(Model(deaths=3))
    assert not wrong, wrong[0]
    assert count > 350, count


def test_a_journal_that_is_written_after_the_socket_is_found() -> None:
    _, wrong = explore(Model(socket_first=True, deaths=1))
    assert wrong


@pytest.mark.parametrize("off", [1, -1])
def test_a_count_that_is_off_by_one_is_found(off: int) -> None:
    _, wrong = explore(Model(miscounted=off, deaths=1))
    assert wrong


def test_every_line_of_a_change_is_a_place_to_die() -> None:
    model = Model()
    states = model._write(model.first())
    assert len(set(states)) >= 5  # ring, facts, notes, frame, word
