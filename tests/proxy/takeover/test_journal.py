"""The journal: whatever was stored when the process died, what is found is the state before a change or after it."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.proxy.takeover import journal
from pdctl.proxy.takeover.journal import (
    FACT_BYTES,
    LOST,
    NOTE_BYTES,
    OUT_BYTES,
    PAGE,
    Frame,
    Journal,
    Slot,
    journal_bytes,
)
from pdctl.proxy_wire import SLOT_BYTES

COOKIE = 77


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def slot_in(content: bytes | None = None) -> tuple[mmap.mmap, Slot]:
    area = mmap.mmap(-1, PAGE + SLOT_BYTES)
    if content is not None:
        area[:] = content
    return area, Slot(memoryview(area), 0)


def taken() -> tuple[mmap.mmap, Slot]:
    area, slot = slot_in()
    slot.take(COOKIE, 0, int)
    return area, slot


def test_output_is_found_again_also_around_the_end_of_the_ring() -> None:
    _, slot = taken()
    said = b""
    for number in range(500):
        part = b"%d;" % number * 200
        slot.safe = len(said)  # the kernel has taken everything
        assert slot.put(part)
        said += part
    found = slot.load()
    assert found is not None
    assert found.end == len(said) > OUT_BYTES
    assert slot.output(len(said) - OUT_BYTES, len(said)) == said[-OUT_BYTES:]
    assert slot.output(len(said), len(said)) == b""


def test_output_that_the_kernel_does_not_have_is_never_overwritten() -> None:
    unsent = OUT_BYTES - 10
    _, slot = taken()
    slot.unsent = lambda: unsent
    assert slot.put(b"a" * unsent)
    before = slot.load()
    assert not slot.put(b"b" * 11)
    assert not slot.change(Frame(), b"b" * 11)
    assert slot.load() == before
    assert slot.output(0, unsent) == b"a" * unsent
    assert slot.put(b"b" * 10)
    unsent = 10  # the kernel took the first part
    assert slot.put(b"c" * (OUT_BYTES - 10))
    assert slot.output(unsent_at := OUT_BYTES - 10, OUT_BYTES) == b"b" * 10, unsent_at


def test_a_part_without_room_for_its_notes_changes_nothing() -> None:
    _, slot = taken()
    assert slot.change(Frame(facts=2), b"head", b"", b"{}")
    assert slot.put(b"x", b"1," * (NOTE_BYTES // 2))
    before = slot.load()
    assert not slot.put(b"y", b"1,")
    assert slot.load() == before
    assert not slot.change(Frame(), b"", b"", b"f" * (FACT_BYTES + 1))


def test_an_answer_and_the_next_one() -> None:
    _, slot = taken()
    assert slot.change(Frame(facts=2), b"head", b"P1:0,", b"{}")
    assert slot.put(b"part", b"7,")
    found = slot.load()
    assert found is not None
    assert (found.frame.answer_at, found.end, found.notes, found.facts) == (0, 8, b"P1:0,7,", b"{}")
    assert slot.change(Frame(read_before=100, answer_at=12), b"last", b"")
    found = slot.load()
    assert found is not None
    assert (found.frame.answer_at, found.end, found.notes, found.facts) == (12, 12, b"", b"")
    slot.free()
    assert slot.load() is None


def test_a_lost_slot_can_begin_again() -> None:
    _, slot = taken()
    assert slot.put(b"x" * 10)
    slot.lose()
    found = slot.load()
    assert found is not None
    assert found.frame.flags == LOST
    slot.begin_again(taken=1000, read=50)
    found = slot.load()
    assert found is not None
    assert (found.end, found.frame) == (1000, Frame(read_before=50, answer_at=1000))
    assert slot.put(b"y" * OUT_BYTES)


class Torn:
    """A slot's memory that notes each store, so that a death after any part of any of them can be looked at."""

    def __init__(self) -> None:
        self.before: bytes = b""
        self.after: bytes = b""

    def states(self) -> Iterator[bytes]:
        """The memory after each changed byte, in any block order that stores within one change may have: the word is
        one store, everything else may be there in part."""
        word = PAGE + 8
        changed = [at for at in range(len(self.before)) if self.before[at] != self.after[at]]
        body = [at for at in changed if not word <= at < word + 8]
        now = bytearray(self.before)
        yield bytes(now)
        for at in body:
            now[at] = self.after[at]
            yield bytes(now)
        now[word : word + 8] = self.after[word : word + 8]
        yield bytes(now)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("part"), st.binary(min_size=1, max_size=6), st.integers(0, 99)),
        st.tuples(st.just("begin"), st.binary(min_size=1, max_size=6), st.integers(0, 99)),
        st.tuples(st.just("last"), st.binary(min_size=1, max_size=6), st.integers(0, 99)),
        st.tuples(st.just("lose"), st.just(b""), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


def carried_out(slot: Slot, kind: str, data: bytes, number: int) -> None:
    if kind == "part":
        assert slot.put(data, b"%d," % number if slot.frame.facts else b"")
    elif kind == "begin" and not slot.frame.facts:
        assert slot.change(Frame(facts=2, answer_at=slot.end), data, b"P%d:0," % number, b"%02d" % number)
    elif kind == "last":
        assert slot.change(Frame(read_before=number, answer_at=slot.end + len(data)), data, b"")
    elif kind == "lose":
        slot.lose()


@settings(deadline=None, max_examples=60)
@given(CHANGES)
def test_a_torn_change_is_not_there(changes: list[tuple[str, bytes, int]]) -> None:
    # Small areas: the test looks at every byte of them.
    small = {"IN_BYTES": 64, "OUT_BYTES": 64, "NOTE_BYTES": 64, "_OUT_MASK": 63, "SLOT_BYTES": PAGE + 192}
    kept = {name: getattr(journal, name) for name in small}
    for name, value in small.items():
        setattr(journal, name, value)
    try:
        area = mmap.mmap(-1, 2 * PAGE + 192)
        slot = Slot(memoryview(area), 0)
        slot.take(COOKIE, 0, int)
        for kind, data, number in changes:
            torn = Torn()
            torn.before, old = bytes(area), slot.load()
            old_output = slot.output(max(0, slot.end - 64 + len(data)), slot.end)
            carried_out(slot, kind, data, number)
            torn.after, new = bytes(area), slot.load()
            for state in torn.states():
                copy = mmap.mmap(-1, len(state))
                copy[:] = state
                seen = Slot(memoryview(copy), 0)
                found = seen.load()
                assert found in (old, new)
                assert found is not None
                assert seen.output(max(0, slot_end(old) - 64 + len(data)), slot_end(old)) == old_output
                if found == new and new is not None and kind != "lose" and new != old:
                    assert seen.output(new.end - len(data), new.end) == data or kind == "begin"
    finally:
        for name, value in kept.items():
            setattr(journal, name, value)


def slot_end(found: journal.Found | None) -> int:
    assert found is not None
    return found.end


# -- the whole journal -------------------------------------------------------------------------------------


def test_slots_are_given_and_taken_back(memory: int) -> None:
    made = Journal(memory, 2)
    first, second = made.slot(), made.slot()
    assert first is not None
    assert second is not None
    assert made.slot() is None
    assert made.used == 2
    first.take(1, 0, int)
    made.give_back(first)
    assert made.slot() is first


def test_the_next_process_finds_the_slots_in_use(memory: int) -> None:
    made = Journal(memory, 3)
    slot = made.slot()
    assert slot is not None
    slot.take(COOKIE, 5, int)
    assert slot.put(b"hello")
    after = Journal(memory, 8)  # the size is that of the journal that is there
    assert (len(after), after.used, after.refused) == (3, 1, "")
    [found] = [found for slot in after.slots if (found := slot.load())]
    assert (found.cookie, found.origin, found.end) == (COOKIE, 5, 5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"short", "too short"),
        (b"x" * 64, "no journal"),
        (struct.pack("16sIIIII", b"pdctl-takeover", 2, 1, 1, 1, 1), "another version"),
    ],
)
def test_a_foreign_journal_is_refused_and_replaced(memory: int, content: bytes, reason: str) -> None:
    os.pwrite(memory, content, 0)
    made = Journal(memory, 4)
    assert reason in made.refused
    assert (len(made), made.used) == (4, 0)


def test_a_journal_that_was_cut_short_is_refused(memory: int) -> None:
    Journal(memory, 4)
    os.ftruncate(memory, journal_bytes(4) - 1)
    assert "size" in Journal(memory, 4).refused


def test_only_pages_that_are_used_take_memory(memory: int) -> None:
    made = Journal(memory, 64)
    slot = made.slot()
    assert slot is not None
    slot.take(COOKIE, 0, int)
    assert slot.put(b"x" * 5000)
    assert os.fstat(memory).st_blocks * 512 < journal_bytes(64) / 20


def test_the_kernel_writes_into_a_slot(memory: int) -> None:
    """What a process has read from a socket is in the slot, also if it died before it could note anything."""
    made = Journal(memory, 1)
    slot = made.slot()
    assert slot is not None
    slot.take(COOKIE, 0, int)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"POST / HTTP/1.1")
        assert ours.recv_into(slot.room_in(10)) == 15
    assert Journal(memory, 1).slots[0].input(25)[10:] == b"POST / HTTP/1.1"
