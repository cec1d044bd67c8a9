"""A new proxy goes on with the connections of one that has died.

The journal says what the dead proxy meant to send, the kernel how much of it was taken and how much input was read. The
difference is sent first. Then each request without a complete answer goes on: one whose client has nothing yet begins
again; a stream continues with the tokens that were noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

from pdctl.net.keeping import CRASHED, END, KEPT, TakenOver, cookie_of, receive
from pdctl.proxy.takeover.covers import Covers
from pdctl.proxy.takeover.journal import CLOSES, CONTINUED, IN_BYTES, LOST, OUT_BYTES, Found, Slot
from pdctl.proxy.takeover.kernel import Counts, counts_of
from pdctl.proxy.takeover.notes import Resumed, read
from pdctl.proxy.takeover.protocol import CoveredConnection, CoveredProtocol

_log = logging.getLogger(__name__)

# How long the keeper may take to send the connections, seconds.
_GET_S = 5.0
_LOOK_S = 0.005
_MAX_REASONS = 8
# Proxies that may crash while they have a request which none of them brings forward: it may be what ends them.
_MOST_CRASHES = 3


class CannotGoOn(Exception):
    """A connection cannot be continued exactly. The message is for the log."""


@dataclass(frozen=True, slots=True)
class Adoptable:
    """How one connection goes on.

    `unsent`: output that the kernel does not have; `input`: bytes of requests without a complete answer, of
    `input_size` in the slot; `resumed`: the answer in progress; `forgets`: its output is dropped.
    """

    found: Found
    taken: int
    unsent: bytes
    input: bytes
    input_size: int
    resumed: Resumed | None = None
    forgets: bool = False
    closes: bool = False
    continued: bool = False


def adoptable(slot: Slot, found: Found, counts: Counts) -> Adoptable:
    """Decide how a connection goes on. Raises CannotGoOn."""
    frame = found.frame
    taken, size = counts.taken - found.origin, counts.read - frame.read_before
    if not counts.open:
        raise CannotGoOn("the client had left")
    if frame.flags & LOST:
        raise CannotGoOn("its request or answer did not fit into a slot")
    if not 0 <= taken <= found.end or found.end - taken > OUT_BYTES or not frame.answer_at <= found.end:
        raise CannotGoOn(f"the kernel has taken {taken} bytes, the journal has {found.end}")
    if not 0 <= size <= IN_BYTES:
        raise CannotGoOn(f"{size} bytes of requests were read, the journal has room for {IN_BYTES}")
    end, resumed, forgets = found.end, None, False
    if found.end > frame.answer_at:
        if taken <= frame.answer_at:
            # The client has nothing of this answer: the request begins again.
            end, forgets = frame.answer_at, True
        elif not frame.facts:
            raise CannotGoOn("its answer is of a kind that cannot be continued")
        else:
            resumed = _resumed(found)
    rest = slot.input(size)[_answered(slot.input(size), frame.answered) :]
    return Adoptable(
        found, taken, slot.output(taken, end), rest, size, resumed, forgets,
        bool(frame.flags & CLOSES), bool(frame.flags & CONTINUED),
    )  # fmt: skip


def _is_open(connection: socket.socket) -> bool:
    try:
        return counts_of(connection).open
    except OSError:
        return False


def _progress(plan: Adoptable, counts: Counts) -> int:
    """A number that grows with what has been read and answered. An answer that begins again does not count."""
    frame = plan.found.frame
    return counts.read + frame.answered + (frame.answer_at if plan.forgets else plan.found.end)


def _resumed(found: Found) -> Resumed:
    try:
        return read(found.facts, found.notes)
    except ValueError as failure:
        raise CannotGoOn(str(failure)) from failure


class _Counter:
    """Counts the requests that a parser has seen to their end."""

    def __init__(self) -> None:
        self.complete = 0

    def on_message_complete(self) -> None:
        """See httptools."""
        self.complete += 1


def _answered(data: bytes, count: int) -> int:
    """Where the first `count` requests end. Raises CannotGoOn."""
    if not count:
        return 0
    counter = _Counter()
    parser = httptools.HttpRequestParser(counter)
    try:
        for at in range(len(data)):
            parser.feed_data(data[at : at + 1])
            if counter.complete == count:
                return at + 1
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as failure:
        raise CannotGoOn(f"its requests cannot be told apart: {failure}") from failure
    raise CannotGoOn("its request was answered before it was complete")


@dataclass(slots=True)
class _Sum:
    connections: int = 0
    resumed: int = 0
    repeated: int = 0
    cut: int = 0
    resent: int = 0
    reasons: list[str] = field(default_factory=list)


class Adoption:
    """Adopts everything that the keeper sends. `make`: a new protocol, as for a new connection."""

    def __init__(self, covers: Covers, make: Callable[[], CoveredProtocol]) -> None:
        self._covers = covers
        self._make = make
        self._sum = _Sum()
        self._after_crash = False

    async def run(self) -> None:
        """Adopt, and tell the supervisor what became of the connections."""
        began = time.monotonic()
        kept = await self._kept()
        slots = {found.cookie: slot for slot in self._covers.journal.slots if (found := slot.load()) is not None}
        for cookie, connection in kept.items():
            slot = slots.pop(cookie, None)
            if slot is not None:
                await self._adopt(cookie, connection, slot)
            elif _is_open(connection):
                await self._begin(cookie, connection)
            else:
                connection.close()
                self._covers.drop(cookie)
        for slot in slots.values():
            # Its connection ended together with the proxy.
            self._covers.journal.give_back(slot)
        total = self._sum
        taken_over = TakenOver(
            connections=total.connections,
            resumed=total.resumed,
            repeated=total.repeated,
            cut=total.cut,
            resent=total.resent,
            seconds=round(time.monotonic() - began, 4),
            reasons=tuple(total.reasons),
        )
        self._covers.report(taken_over)
        if kept:
            _log.info("took over %d connections: %s", total.connections, taken_over)

    async def _kept(self) -> dict[int, socket.socket]:
        """The connections that the keeper has, by cookie."""
        channel, found = self._covers.keeper, dict[int, socket.socket]()
        deadline = time.monotonic() + _GET_S
        while channel is not None and time.monotonic() < deadline:
            try:
                packet = receive(channel)
            except BlockingIOError:
                await asyncio.sleep(_LOOK_S)
                continue
            except OSError:
                break
            if packet is None or packet.kind == END:
                self._after_crash = packet is not None and packet.body == CRASHED
                break
            if packet.kind == KEPT:
                for descriptor in packet.descriptors:
                    connection = socket.socket(fileno=descriptor)
                    found[cookie_of(descriptor)] = connection
        return found

    async def _adopt(self, cookie: int, connection: socket.socket, slot: Slot) -> None:
        found = slot.load()
        assert found is not None
        try:
            counts = counts_of(connection)
            plan = adoptable(slot, found, counts)
            if self._after_crash and plan.input and slot.crashed(_progress(plan, counts)) >= _MOST_CRASHES:
                raise CannotGoOn(f"{_MOST_CRASHES} proxies have crashed while they had its request")
            slot.resume(found, plan.taken, int)
            if plan.forgets:
                slot.forget_output()
            connection.setblocking(False)
            http = self._make()
            adopted = AdoptedConnection(self._covers, http, connection, cookie, slot, plan)
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: adopted, connection)
        except (CannotGoOn, OSError) as failure:
            self._covers.journal.give_back(slot)
            self._cut(cookie, connection, str(failure))
            return
        total = self._sum
        total.connections += 1
        total.resent += len(plan.unsent)
        if plan.resumed is not None:
            total.resumed += 1
        elif http.cycle is not None:
            total.repeated += 1

    async def _begin(self, cookie: int, connection: socket.socket) -> None:
        """A connection without a slot: it had only just been accepted, was not covered, or was about to be closed."""
        slot = self._covers.journal.slot()
        try:
            counts = counts_of(connection)
            if slot is None or counts.taken or counts.read:
                raise CannotGoOn("it has no slot")
            slot.take(cookie, counts.taken, int)
            connection.setblocking(False)
            made = CoveredConnection(self._covers, self._make(), connection, cookie, slot)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: made, connection)
        except (CannotGoOn, OSError) as failure:
            if slot is not None:
                self._covers.journal.give_back(slot)
            self._cut(cookie, connection, str(failure))
            return
        self._covers.counts.covered += 1
        self._sum.connections += 1

    def _cut(self, cookie: int, connection: socket.socket, reason: str) -> None:
        self._sum.cut += 1
        if len(self._sum.reasons) < _MAX_REASONS and reason not in self._sum.reasons:
            self._sum.reasons.append(reason)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        self._covers.drop(cookie)


class AdoptedConnection(CoveredConnection):
    """A connection that another proxy had."""

    def __init__(
        self,
        covers: Covers,
        http: CoveredProtocol,
        connection: socket.socket,
        cookie: int,
        slot: Slot,
        plan: Adoptable,
    ) -> None:
        super().__init__(covers, http, connection, cookie, slot)
        self._plan = plan

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol. Nothing new is read before what the other proxy has read was handled."""
        super().connection_made(transport)
        plan, cover, http = self._plan, self.cover, self.http
        assert cover is not None
        cover.at, cover.read = plan.input_size, plan.found.frame.read_before + plan.input_size
        if plan.unsent:
            cover.send(plan.unsent)
        if plan.closes:
            cover.close()
            return
        http.receiving = False
        http.resumed, http.continued, http.is_repeated = plan.resumed, plan.continued, True
        if plan.input:
            http.data_received(plan.input)
        http.is_repeated = False
        if http.resumed is not None:
            _log.warning("the request of an answer in progress was not found again")
            cover.abort()
