"""All of a proxy's covered connections: their slots, and the channel to the supervisor, which keeps duplicates."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from typing import Protocol

import msgspec

from pdctl.net.keeping import DROP, KEEP, REPORT, TAKEOVER_ENV, UNCOVERED, TakenOver, cookie_of, send
from pdctl.proxy.takeover.cover import CoverCounts
from pdctl.proxy.takeover.journal import Journal, Slot
from pdctl.proxy.takeover.kernel import counts_of

_log = logging.getLogger(__name__)

# Packets that the keeper has had no room for yet; beyond these there are no more.
_MAX_UNTOLD = 65536


class Leaving(Protocol):
    """A connection, as a proxy that is about to leave sees it."""

    def may_be_left(self) -> bool:
        """Whether the process may end now without harm to it. Asked again and again; nothing new begins on it."""
        ...


class Covers:
    """Makes covers, and ends them. `open`: connections, covered or not."""

    def __init__(self, journal: Journal, keeper: socket.socket) -> None:
        self.journal = journal
        self.counts = CoverCounts()
        self._keeper: socket.socket | None = keeper
        self._untold: deque[tuple[bytes, bytes]] = deque()
        self.open: set[Leaving] = set()

    @property
    def keeper(self) -> socket.socket | None:
        """The channel; None if the supervisor is gone."""
        return self._keeper

    def new(self, connection: socket.socket) -> tuple[int, Slot] | None:
        """A slot for a connection that has just come, and its cookie; None if it is not covered."""
        slot = self.journal.slot() if self._keeper is not None else None
        if slot is None:
            self.counts.uncovered += 1
            with contextlib.suppress(OSError):
                self._say(UNCOVERED, 0)
            return None
        try:
            cookie, counts = cookie_of(connection.fileno()), counts_of(connection)
            slot.take(cookie, counts.taken, int)
            self._say(KEEP, cookie, [connection.fileno()])
        except OSError:
            self.journal.give_back(slot)
            self.counts.uncovered += 1
            return None
        self.counts.covered += 1
        return cookie, slot

    def ended(self, slot: Slot, cookie: int) -> None:
        """A covered connection has ended."""
        self.drop(cookie)
        self.journal.give_back(slot)

    def drop(self, cookie: int) -> None:
        """Have the keeper close its duplicate."""
        self._tell_surely(DROP, cookie.to_bytes(8, "little"))

    def report(self, taken_over: TakenOver) -> None:
        """Tell the supervisor what became of the predecessor's connections."""
        self.counts.taken_over = taken_over
        self._tell_surely(REPORT, msgspec.json.encode(taken_over))

    def _say(self, kind: bytes, cookie: int, descriptors: list[int] | None = None) -> None:
        if self._keeper is None:
            raise OSError("the supervisor is gone")
        send(self._keeper, kind, cookie.to_bytes(8, "little"), descriptors)

    def _tell_surely(self, kind: bytes, body: bytes) -> None:
        """Tell the keeper now, or later if it is busy."""
        if self._keeper is None:
            return
        if self._untold:
            self._wait(kind, body)
            return
        try:
            send(self._keeper, kind, body)
        except BlockingIOError:
            self._wait(kind, body)
        except OSError:
            self._keeper = None

    def _wait(self, kind: bytes, body: bytes) -> None:
        if len(self._untold) < _MAX_UNTOLD and self._keeper is not None:
            if not self._untold:
                asyncio.get_running_loop().add_writer(self._keeper.fileno(), self._tell)
            self._untold.append((kind, body))

    def _tell(self) -> None:
        assert self._keeper is not None
        loop = asyncio.get_running_loop()
        try:
            while self._untold:
                send(self._keeper, *self._untold[0])
                self._untold.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._untold.clear()
        loop.remove_writer(self._keeper.fileno())


def covers_of_environment() -> Covers | None:
    """The covers that the supervisor wants; None without takeover."""
    told = os.environ.get(TAKEOVER_ENV)
    if not told:
        return None
    keeper, memory, slots = map(int, told.split(","))
    journal = Journal(memory, slots)
    if journal.refused:
        _log.warning("nothing is taken over: %s", journal.refused)
    return Covers(journal, socket.socket(fileno=keeper))
