"""The HTTP protocol over a covered connection.

The kernel writes what it reads directly into the slot, so nothing that a client has sent can be lost between the socket
and the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pdctl.net.openai.api import ApiError
from pdctl.proxy.client.connections import BoundedProtocol
from pdctl.proxy.takeover.cover import Cover, Reply
from pdctl.proxy.takeover.covers import Covers
from pdctl.proxy.takeover.journal import Slot
from pdctl.proxy.takeover.kernel import counts_of
from pdctl.proxy.takeover.notes import Resumed

# Where in a request's scope the answer stands that another proxy began.
RESUMED = "pdctl.resumed"
# The request came to another proxy: it was admitted there.
REPEATED = "pdctl.repeated"
# Input of connections that are not covered. Each read is handled before the next one.
_scratch = bytearray(64 * 1024)


class CoveredProtocol(BoundedProtocol):
    """Every request gets a transport of its own, so that its answer is noted as one."""

    cover: Cover | None = None
    resumed: Resumed | None = None
    # An interim answer was sent by another proxy.
    continued = False
    is_repeated = False

    def on_headers_complete(self) -> None:
        """The head is complete."""
        before = self.cycle
        super().on_headers_complete()
        if self.cover is not None and self.cycle is not before:
            self.cycle.transport = cast(asyncio.Transport, Reply(self.cover, self.cycle))
            if self.is_repeated:
                self._go_on(self.cycle)

    def _go_on(self, cycle: RequestResponseCycle) -> None:
        """This request came to another proxy."""
        cycle.scope[REPEATED] = True  # type: ignore[literal-required]  # ASGI allows server-specific keys
        if self.continued:
            self.continued = cycle.waiting_for_100_continue = False
        if self.resumed is not None:
            cycle.scope[RESUMED] = self.resumed  # type: ignore[literal-required]
            cycle.response_started = True
            cycle.keep_alive = cycle.keep_alive and not self.resumed.facts.closes
            self.resumed = None

    def _refuse(self, failure: ApiError) -> None:
        """Answer bytes that are not HTTP. Such an answer ends the connection, and is not noted."""
        if self.cover is not None and (self.cycle is None or self.cycle.response_complete):
            self.cover.lose()
        super()._refuse(failure)

    def is_between(self) -> bool:
        """Whether every byte so far belongs to a request whose answer is complete, or is about to be."""
        return not (self.receiving or self.pipeline or self.refused)


class CoveredConnection(asyncio.BufferedProtocol):
    """Reads into a slot, for one CoveredProtocol. `slot`: None for a connection that is not covered."""

    def __init__(
        self, covers: Covers, http: CoveredProtocol, connection: socket.socket, cookie: int, slot: Slot | None
    ) -> None:
        self.http = http
        self.cover: Cover | None = None
        self._covers, self._connection, self._cookie, self._slot = covers, connection, cookie, slot
        self._room = memoryview(_scratch)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        # uvloop's transports do what asyncio's do, but are no subclass.
        transport = cast(asyncio.Transport, transport)
        self._covers.open.add(self)
        if self._slot is None:
            self._covers.counts.open_uncovered += 1
            self.http.connection_made(transport)
            return
        self._slot.unsent = transport.get_write_buffer_size
        self.http.cover = self.cover = Cover(transport, self._slot, self.http.is_between, self._covers.counts)
        self.http.connection_made(cast(asyncio.Transport, self.cover))

    def never_made(self) -> None:
        """The connection ended before `connection_made`."""
        if self._slot is not None and self.cover is None:
            self._covers.ended(self._slot, self._cookie)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol. A close alone does not end a connection that the keeper has, too."""
        self._covers.open.discard(self)
        if self.cover is None:
            self._covers.counts.open_uncovered -= 1
        else:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            # A handler may still write, and the slot is another client's from now on.
            self._covers.ended(self.cover.end(), self._cookie)
        self.http.connection_lost(exc)

    def get_buffer(self, _: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        cover = self.cover
        if cover is not None:
            self._try_to_regain(cover)
            if cover.slot is not None:
                self._room = cover.slot.room_in(cover.at)
                if len(self._room):
                    return self._room
                cover.lose()
        self._room = memoryview(_scratch)
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        data = bytes(self._room[:nbytes])
        cover = self.cover
        if cover is not None:
            cover.at += nbytes
            cover.read += nbytes
        self.http.data_received(data)

    def eof_received(self) -> bool:
        """See asyncio.BufferedProtocol."""
        return self.http.eof_received()

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self.http.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self.http.resume_writing()

    def may_be_left(self) -> bool:
        """See Leaving. A connection that the next proxy cannot take over is closed after its answer."""
        if self.cover is not None:
            self._try_to_regain(self.cover)
        if self.cover is None or self.cover.lost is not None:
            if not self.http.leaving:
                self.http.shutdown()
            return False
        has_no_request = self.cover.at == 0 or self.http.is_between()
        if has_no_request and self._is_answered and not self.cover.is_closing():
            self.cover.pause_reading()
        return self.cover.can_go_on()

    @property
    def _is_answered(self) -> bool:
        return self.http.cycle is None or self.http.cycle.response_complete

    def _try_to_regain(self, cover: Cover) -> None:
        if cover.lost is None or not cover.is_between() or cover.get_write_buffer_size():
            return
        if not self._is_answered:
            return
        with contextlib.suppress(OSError):
            counts = counts_of(self._connection)
            cover.regain(counts.taken - cover.lost.origin, counts.read)
