"""`GET /v1/events`: a service's events as server-sent events, from a cursor on and then as they happen.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import anyio
from starlette.types import Receive, Scope, Send

from pdctl.control_api import HEARTBEAT_S, MOST_WAITING
from pdctl.net.asgi import send_part, start_stream, while_connected
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.journal_reader import Entry, JournalReader

# A line that begins with a colon is a comment, which clients skip.
HEARTBEAT = b": still here\n\n"
# For another node's agent: what had happened before is told.
UP_TO_DATE = b": up to date\n\n"
_MARK = Entry("", b"")


class Stream(Protocol):
    """What one reader gets: an ASGI application that answers one request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
    def end(self) -> None: ...


class Streams:
    """Everybody who follows events."""

    def __init__(self) -> None:
        self._streams: set[Stream] = set()
        self._one_left = asyncio.Event()

    def after(self, cursor: str, follow: bool = True) -> Stream:
        """What follows the cursor; with `follow`, also what happens from now on. Raises BadCursor."""
        stream = self._open(cursor, follow)
        self._streams.add(stream)
        return stream

    def _open(self, cursor: str, follow: bool) -> Stream:
        raise NotImplementedError

    async def end(self, within_s: float) -> None:
        """End every stream, with what has happened so far. One that is not read by then goes on."""
        for stream in self._streams:
            stream.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._streams:
                    self._one_left.clear()
                    await self._one_left.wait()

    def _has_left(self, stream: Stream) -> None:
        self._streams.discard(stream)
        self._one_left.set()


class EventStreams(Streams):
    """Everybody who follows the events of this machine.

    `heartbeat_s`: the longest silence, seconds; `most_waiting`: events that are kept for a reader who lags; `marks`:
    tell where the past ends.
    """

    def __init__(
        self,
        journal: Journal,
        heartbeat_s: float = HEARTBEAT_S,
        most_waiting: int = MOST_WAITING,
        marks: bool = False,
    ) -> None:
        super().__init__()
        self._journal = journal
        self._heartbeat_s = heartbeat_s
        self._most_waiting = most_waiting
        self._marks = marks

    def _open(self, cursor: str, follow: bool) -> EventStream:
        reader = JournalReader(self._journal.folder, cursor)
        stream = EventStream(self._journal, reader, self._heartbeat_s, self._most_waiting, self._has_left, self._marks)
        if not follow:
            stream.end()
        return stream


class EventStream:
    """One reader's. What happens while it lags is kept up to a bound: then it gets what was kept, and the end.

    What had happened before it came is read as fast as it reads, and never counts as lag.
    """

    def __init__(
        self,
        journal: Journal,
        reader: JournalReader,
        heartbeat_s: float,
        most_waiting: int,
        left: Callable[[EventStream], None],
        marks: bool,
    ) -> None:
        self._journal = journal
        self._reader = reader
        self._heartbeat_s = heartbeat_s
        self._left = left
        self._marks = marks
        self._waiting: asyncio.Queue[Entry | None] = asyncio.Queue(most_waiting)
        self._over = False
        self._changed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the reader leaves, or `end`."""
        try:
            await start_stream(send)
            await while_connected(receive, lambda: self._serve(send))
        finally:
            self._left(self)

    def end(self) -> None:
        """Say what has happened so far, and no more."""
        self._over = True
        self._changed.set()

    async def _serve(self, send: Send) -> None:
        with self._journal.followed() as self._changed:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._fill)
                await self._empty(send)

    async def _fill(self) -> None:
        """Put what happens into the queue; at last None."""
        is_up_to_date = False
        while True:
            self._changed.clear()
            entries = self._reader.read()
            for entry in entries:
                if is_up_to_date and self._waiting.full():
                    await self._waiting.put(None)
                    return
                await self._waiting.put(entry)
            if entries:
                # Several at once are no lag yet: first the reader gets these.
                await asyncio.sleep(0)
            elif self._over:
                await self._waiting.put(None)
                return
            else:
                if self._marks and not is_up_to_date:
                    await self._waiting.put(_MARK)
                is_up_to_date = True
                await self._changed.wait()

    async def _empty(self, send: Send) -> None:
        """Send what is in the queue, and a sign of life where there is nothing."""
        while True:
            entry: Entry | None
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    entry = await self._waiting.get()
            except TimeoutError:
                await send_part(send, HEARTBEAT)
                continue
            if entry is None:
                await send_part(send, b"", last=True)
                return
            told = UP_TO_DATE if entry is _MARK else b"id: %b\ndata: %b\n\n" % (entry.cursor.encode(), entry.line)
            await send_part(send, told)
