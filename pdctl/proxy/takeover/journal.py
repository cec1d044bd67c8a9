"""The journal of clients' connections: slots in memory that outlives the proxy.

A slot has the bytes that one connection has received for requests without a complete answer, the last bytes that were
meant for the client, and notes on the answer in progress. Everything is written here before it goes to the socket.
After a death, the kernel says how many bytes each side has taken; the rest is here.

A change counts with one store of 8 bytes, the slot's word: (frame, length of the notes, end of the output). What is
written before that store is not part of the journal. There are two frames; a change of the other fields is written to
the one that is not in use, and the word then names it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pdctl.proxy_wire import SLOT_BYTES

_MAGIC = b"pdctl-takeover\0\0"
_VERSION = 1
PAGE = 4096
# Bytes of a slot: requests without a complete answer, output that the kernel may not have yet, notes.
IN_BYTES = 256 * 1024
OUT_BYTES = 128 * 1024
NOTE_BYTES = 256 * 1024
assert SLOT_BYTES == PAGE + IN_BYTES + OUT_BYTES + NOTE_BYTES, "the plan says how much it is"
FACT_BYTES = 1024

_OUT_MASK = OUT_BYTES - 1
_HEAD = struct.Struct("16sIIIII")
# Positions in a slot's first page.
_COOKIE, _WORD, _ORIGIN, _CRASHES, _DONE, _FRAMES, _FACTS = 0, 8, 16, 24, 32, 64, 256
_WORD_AT = _WORD // 8
_FRAME = struct.Struct("QQIII")
_FRAME_ROOM = 64
_END_BITS, _NOTE_BITS = 40, 23
_MOST_END, _MOST_NOTES = 1 << _END_BITS, 1 << _NOTE_BITS
_SELECT_SHIFT = _END_BITS + _NOTE_BITS

# Flags of a frame: the slot does not have everything any more; the request in progress was sent an interim answer; the
# connection ends with the last answer.
LOST, CONTINUED, CLOSES = 1, 2, 4


def journal_bytes(slots: int) -> int:
    """The size of a journal. Only pages that are used take memory."""
    return PAGE + slots * SLOT_BYTES


@dataclass(frozen=True, slots=True)
class Frame:
    """The fields of a slot that change together.

    `read_before`: bytes that the connection had received before the first byte of the slot's input; `answer_at`: where
    the answer in progress begins in the output; `answered`: requests of the input with a complete answer; `facts`: the
    length of the facts on the answer in progress, 0 if it cannot be continued.
    """

    read_before: int = 0
    answer_at: int = 0
    answered: int = 0
    facts: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a slot says after a death. `end`: bytes of output ever; `origin`: the kernel's count when it began."""

    cookie: int
    origin: int
    frame: Frame
    end: int
    notes: bytes
    facts: bytes


class Slot:
    """The journal of one connection. Only its proxy writes, and reads none of it back."""

    __slots__ = (
        "_base",
        "_facts",
        "_in",
        "_limit",
        "_memory",
        "_notes",
        "_out",
        "_safe",
        "_select",
        "_words",
        "cookie",
        "end",
        "frame",
        "noted",
        "number",
        "origin",
        "unsent",
    )  # fmt: skip

    def __init__(self, memory: memoryview, number: int) -> None:
        base = PAGE + number * SLOT_BYTES
        self.number = number
        self._base, self._memory = base, memory
        self._words = memory[base : base + PAGE].cast("Q")
        self._facts = memory[base + _FACTS : base + _FACTS + FACT_BYTES]
        at = base + PAGE
        self._in = memory[at : at + IN_BYTES]
        self._out = memory[at + IN_BYTES : at + IN_BYTES + OUT_BYTES]
        self._notes = memory[at + IN_BYTES + OUT_BYTES : base + SLOT_BYTES]
        self.unsent: Callable[[], int] = int
        self.origin = 0
        self._begin(0, Frame(), 0, 0, 0)

    def _begin(self, cookie: int, frame: Frame, end: int, noted: int, select: int) -> None:
        self.cookie, self.frame, self.end, self.noted = cookie, frame, end, noted
        self.safe = end
        self._select = select << _SELECT_SHIFT

    @property
    def safe(self) -> int:
        """The kernel has certainly taken output before this."""
        return self._safe

    @safe.setter
    def safe(self, taken: int) -> None:
        self._safe = taken
        # Output that ends there has room in any case.
        self._limit = min(taken + OUT_BYTES, _MOST_END - 1)

    # -- a connection's life -------------------------------------------------------------------------------

    def take(self, cookie: int, origin: int, unsent: Callable[[], int]) -> None:
        """Begin the journal of a connection. `unsent`: output that the kernel does not have yet, at most."""
        assert cookie
        self.unsent, self.origin = unsent, origin
        self._begin(cookie, Frame(), 0, 0, 0)
        self._words[_ORIGIN // 8] = origin
        self._words[_CRASHES // 8] = self._words[_DONE // 8] = 0
        _FRAME.pack_into(self._memory, self._base + _FRAMES, 0, 0, 0, 0, 0)
        self._words[_WORD_AT] = 0
        self._words[_COOKIE // 8] = cookie

    def free(self) -> None:
        """The connection has ended."""
        self._words[_COOKIE // 8] = 0
        self.cookie = 0

    def resume(self, found: Found, taken: int, unsent: Callable[[], int]) -> None:
        """Go on with what `load` found. `taken`: output that the kernel has."""
        self.unsent, self.origin = unsent, found.origin
        self._begin(found.cookie, found.frame, found.end, len(found.notes), self._words[_WORD_AT] >> _SELECT_SHIFT)
        self.safe = taken

    def crashed(self, done: int) -> int:
        """A process has crashed while it had the request in progress. `done`: grows with what was read and answered.
        Returns how many have, this one included, while nothing was done."""
        crashes = 1 + (self._words[_CRASHES // 8] if self._words[_DONE // 8] == done else 0)
        self._words[_DONE // 8], self._words[_CRASHES // 8] = done, crashes
        return crashes

    # -- writing -------------------------------------------------------------------------------------------

    def room_in(self, at: int) -> memoryview:
        """Memory for input from `at` on; the kernel writes there. Empty if the slot is full."""
        return self._in[at:]

    def put(self, data: bytes, notes: bytes = b"") -> bool:
        """Note output that will be written now. Returns False if there is no room, and then nothing has changed.

        Nearly every token takes this path.
        """
        begin, size, before = self.end, len(data), self.noted
        at, end, noted = begin & _OUT_MASK, begin + size, before + len(notes)
        if end <= self._limit and at + size <= OUT_BYTES:
            self._out[at : at + size] = data
        elif not self._place(data):
            return False
        if noted > NOTE_BYTES:
            return False
        if notes:
            self._notes[before:noted] = notes
        self.end, self.noted = end, noted
        self._words[_WORD_AT] = self._select | noted << _END_BITS | end
        return True

    def change(self, frame: Frame, data: bytes = b"", notes: bytes | None = None, facts: bytes = b"") -> bool:
        """Change the frame, note output and set the notes (None: keep them), all at once. Returns False if there is
        no room, and then nothing has changed."""
        end = self._place(data) if data else self.end
        noted = self.noted if notes is None else len(notes)
        if (data and not end) or noted > NOTE_BYTES or len(facts) > FACT_BYTES:
            return False
        if facts:
            # The frame in use names no facts: an answer begins.
            assert not self.frame.facts
            self._facts[: len(facts)] = facts
        if notes:
            # The same of notes.
            assert not self.frame.facts
            self._notes[:noted] = notes
        self._use(frame, end, noted)
        return True

    def forget_output(self) -> None:
        """Drop the output of the answer in progress. None of it may have been taken."""
        self._use(Frame(self.frame.read_before, self.frame.answer_at, self.frame.answered), self.frame.answer_at, 0)
        self.safe = min(self.safe, self.end)

    def lose(self) -> None:
        """The slot does not have everything any more."""
        self._use(Frame(flags=LOST), self.end, 0)

    def begin_again(self, taken: int, read: int) -> None:
        """The slot has everything again: between two requests, when the kernel has all output. `taken`, `read`: bytes
        of the connection so far."""
        self.safe = taken
        self._use(Frame(read_before=read, answer_at=taken), taken, 0)

    def _use(self, frame: Frame, end: int, noted: int) -> None:
        select = 1 - (self._select >> _SELECT_SHIFT)
        at = self._base + _FRAMES + select * _FRAME_ROOM
        _FRAME.pack_into(self._memory, at, frame.read_before, frame.answer_at, frame.answered, frame.facts, frame.flags)
        self._select, self.frame, self.end, self.noted = select << _SELECT_SHIFT, frame, end, noted
        self._words[_WORD_AT] = self._select | noted << _END_BITS | end

    def _place(self, data: bytes) -> int:
        """Write output into the ring. Returns its new end, 0 if there is no room."""
        size, begin = len(data), self.end
        end = begin + size
        if end - self.safe > OUT_BYTES:
            self.safe = max(self.safe, begin - self.unsent())
            if end - self.safe > OUT_BYTES:
                return 0
        if end >= _MOST_END:
            return 0
        at = begin & _OUT_MASK
        to = at + size
        if to <= OUT_BYTES:
            self._out[at:to] = data
        else:
            first = OUT_BYTES - at
            self._out[at:] = data[:first]
            self._out[: size - first] = data[first:]
        return end

    # -- reading, after a death ----------------------------------------------------------------------------

    def load(self) -> Found | None:
        """What the slot says; None if it is free."""
        cookie, word, origin = self._words[_COOKIE // 8], self._words[_WORD_AT], self._words[_ORIGIN // 8]
        if not cookie:
            return None
        at = self._base + _FRAMES + (word >> _SELECT_SHIFT) * _FRAME_ROOM
        frame = Frame(*_FRAME.unpack_from(self._memory, at))
        noted = (word >> _END_BITS) & (_MOST_NOTES - 1)
        notes = bytes(self._notes[:noted]) if frame.facts else b""
        facts = bytes(self._facts[: min(frame.facts, FACT_BYTES)])
        return Found(cookie, origin, frame, word & (_MOST_END - 1), notes, facts)

    def input(self, size: int) -> bytes:
        """The first bytes of the input."""
        return bytes(self._in[:size])

    def output(self, begin: int, end: int) -> bytes:
        """A part of the output that the ring still has."""
        assert 0 <= end - begin <= OUT_BYTES
        at, size = begin & _OUT_MASK, end - begin
        first = min(size, OUT_BYTES - at)
        return bytes(self._out[at : at + first]) + bytes(self._out[: size - first])


class Journal:
    """All slots. `refused`: why an earlier journal was not used, "" if it was, or if there was none."""

    def __init__(self, memory: int, slots: int) -> None:
        """`memory`: the descriptor; an empty file becomes a journal of that many slots."""
        self.refused = ""
        found = _slots_of(memory)
        if isinstance(found, str):
            self.refused, found = found, None
        if found is None:
            os.ftruncate(memory, 0)
            os.ftruncate(memory, journal_bytes(slots))
            found = slots
        self._map = mmap.mmap(memory, journal_bytes(found))
        _HEAD.pack_into(self._map, 0, _MAGIC, _VERSION, found, IN_BYTES, OUT_BYTES, NOTE_BYTES)
        view = memoryview(self._map)
        self.slots = [Slot(view, number) for number in range(found)]
        self._free = [slot for slot in reversed(self.slots) if slot.load() is None]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self.slots) - len(self._free)

    def slot(self) -> Slot | None:
        """A free slot, for the caller to take; None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: Slot) -> None:
        """The connection of a slot has ended."""
        slot.free()
        self._free.append(slot)


def _slots_of(memory: int) -> int | str | None:
    """The number of slots of a journal; None of an empty file; a reason if it is no journal of this version."""
    size = os.fstat(memory).st_size
    if not size:
        return None
    head = os.pread(memory, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        return "the journal is too short"
    magic, version, slots, *sizes = _HEAD.unpack(head)
    if magic != _MAGIC:
        return "the memory holds no journal"
    if version != _VERSION or sizes != [IN_BYTES, OUT_BYTES, NOTE_BYTES]:
        return f"the journal is of another version ({version})"
    if size != journal_bytes(slots) or not slots:
        return "the journal has another size than it says"
    return int(slots)
