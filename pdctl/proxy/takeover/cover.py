"""A client's connection with a slot: everything is noted in the journal before it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pdctl.net.keeping import TakenOver
from pdctl.proxy.takeover.journal import CLOSES, CONTINUED, Frame, Slot
from pdctl.proxy.takeover.notes import Facts, encode_facts


@dataclass(slots=True)
class CoverCounts:
    """What a proxy counts. `uncovered`: connections that came while no slot was free; `lost`: requests or answers that
    did not fit into a slot; `open_uncovered`: connections that are open now and not covered."""

    covered: int = 0
    uncovered: int = 0
    lost: int = 0
    open_uncovered: int = 0
    taken_over: TakenOver = field(default_factory=TakenOver)


class Cover:
    """The transport of one connection. `slot`: None while it is not covered; `is_between`: no request of it is
    answered or half-read.

    `at`: where in the slot's input the next bytes go; `read`: bytes of input so far; `is_exact`: another proxy would
    send exactly the rest of the stream in progress.
    """

    def __init__(
        self, transport: asyncio.Transport, slot: Slot, is_between: Callable[[], bool], counts: CoverCounts
    ) -> None:
        self.slot: Slot | None = slot
        self.at = 0
        self.read = 0
        self.is_exact = True
        self.transport = transport
        self.is_between = is_between
        self.lost: Slot | None = None
        self._counts = counts
        # What the HTTP protocol uses of a transport.
        self.close, self.abort, self.is_closing = transport.close, transport.abort, transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.can_write_eof, self.write_eof = transport.can_write_eof, transport.write_eof
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.send = transport.write

    def get_extra_info(self, name: str, default: object = None) -> Any:
        """See asyncio.BaseTransport."""
        return self.transport.get_extra_info(name, default)

    def write(self, data: bytes) -> None:
        """Write something that is not a part of an answer: an interim answer."""
        slot = self.slot
        if slot is not None:
            frame = slot.frame
            answer_at = slot.end + len(data)
            if not slot.change(replace(frame, answer_at=answer_at, flags=frame.flags | CONTINUED), data):
                self.lose()
        self.send(data)

    def part(self, data: bytes, notes: bytes = b"") -> None:
        """Write another part of an answer. Nearly every token takes this path."""
        slot = self.slot
        if slot is not None and not slot.put(data, notes):
            self.lose()
        self.send(data)

    def answered(self, size: int, closes: bool) -> Frame:
        """The frame after an answer whose last `size` bytes will be written now."""
        assert self.slot is not None
        answer_at, flags = self.slot.end + size, CLOSES if closes else 0
        if self.is_between():
            return Frame(self.read, answer_at, 0, 0, flags)
        before = self.slot.frame
        return Frame(before.read_before, answer_at, before.answered + 1, 0, flags)

    def lose(self) -> None:
        """The slot has no room for this request, or for its answer."""
        if self.slot is not None:
            self._counts.lost += 1
            self.slot.lose()
            self.lost, self.slot = self.slot, None

    def end(self) -> Slot:
        """The connection has ended: nothing more is noted. Returns its slot, for another one."""
        slot = self.slot or self.lost
        assert slot is not None
        self.slot = self.lost = None
        return slot

    def can_go_on(self) -> bool:
        """Whether another proxy could go on with it now, exactly."""
        slot = self.slot
        if slot is None:
            return False
        has_begun = slot.end > slot.frame.answer_at
        return not has_begun or bool(slot.frame.facts and self.is_exact)

    def regain(self, taken: int, read: int) -> None:
        """The slot has everything again. `taken`, `read`: bytes of the connection so far."""
        assert self.lost is not None
        self.lost.begin_again(taken, read)
        self.slot, self.lost = self.lost, None
        self.at, self.read = 0, read


class Reply:
    """The transport of one request's answer."""

    __slots__ = ("_cover", "_cycle", "_go_on", "_head", "_is_last", "is_closing", "part")

    def __init__(self, cover: Cover, cycle: RequestResponseCycle) -> None:
        self._cover = cover
        self._cycle = cycle
        self._head = b""
        self._is_last = False
        self._go_on, cycle.on_response = cycle.on_response, self._completed
        self.is_closing, self.part = cover.is_closing, cover.part

    def close(self) -> None:
        """Close the connection, after the answer if it is complete."""
        if self._cycle.response_complete:
            self._settle()
        self._cover.close()

    def write(self, data: bytes) -> None:
        """Write what uvicorn made of an ASGI message. The head waits for the body: together they are one part."""
        cycle = self._cycle
        if not cycle.response_started:
            self._cover.write(data)
        elif not self._head:
            self._head = data
        else:
            whole, self._head = (self._head + data if self._head != _SENT else data), _SENT
            if cycle.chunked_encoding is False and cycle.expected_content_length == 0:
                self.last(whole, not cycle.keep_alive)
            else:
                self.part(whole)

    def begin(self, data: bytes, notes: bytes, facts: Facts) -> None:
        """Write the first part of an answer that another proxy can continue, or end with an error."""
        slot = self._cover.slot
        self._cover.is_exact = facts.is_exact
        if slot is not None:
            noted = encode_facts(facts)
            if not slot.change(replace(slot.frame, facts=len(noted)), data, notes, noted):
                self._cover.lose()
        self._cover.send(data)

    def last(self, data: bytes, closes: bool) -> None:
        """Write the last part, or a whole answer. `closes`: the connection ends with it."""
        self._is_last = True
        cover = self._cover
        slot = cover.slot
        if slot is not None:
            frame = cover.answered(len(data), closes)
            if not slot.change(frame, data, b""):
                cover.lose()
            elif not frame.answered:
                cover.at = 0
        if data:
            cover.send(data)

    def _completed(self) -> None:
        self._settle()
        self._go_on()

    def _settle(self) -> None:
        """The answer is complete. Some end without a part that says so: to HEAD, without a body, in chunks."""
        if not self._is_last:
            self.last(b"" if self._head == _SENT else self._head, not self._cycle.keep_alive)


_SENT = b"\0"
