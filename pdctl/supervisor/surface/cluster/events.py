"""The events of all nodes as one stream, each with the name of its node.

What had happened before is merged by time; what happens comes as it is heard. A node that does not answer is tried
again, and then tells what it has not told: nothing is left out or told twice. A cursor is that of every node.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import deque
from collections.abc import Callable
from urllib.parse import quote, unquote, urlencode

import msgspec
from starlette.types import Receive, Scope, Send

from pdctl.control_api import HEARTBEAT_S
from pdctl.errors import PdctlError
from pdctl.net.asgi import send_part, start_stream, while_connected
from pdctl.net.http_client import Exchange, Unreachable
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.journal_reader import BadCursor, Entry, JournalReader
from pdctl.supervisor.surface.cluster.agents import CALL_S, AgentClient, Agents
from pdctl.supervisor.surface.events import HEARTBEAT, UP_TO_DATE, Streams

_CURSOR = re.compile(r"([^:,]{1,300}):([0-9a-f]{12}\.[0-9]{1,12})")
# Events of one node that are read ahead of the others'.
_AHEAD = 256
_LONGEST_LINE = 2**20
# A node's stream that is silent for longer is broken, seconds.
_SILENT_S = 3 * HEARTBEAT_S
# Until a node that does not answer is tried again, at most; and how often it is looked for new nodes. Seconds.
_AGAIN_S = 5.0
_LOOK_S = 2.0


class ClusterStreams(Streams):
    """Everybody who follows the events of a cluster. `node`: this one, whose events are in `journal`."""

    def __init__(self, journal: Journal, node: str, agents: Agents, heartbeat_s: float = HEARTBEAT_S) -> None:
        super().__init__()
        self._journal = journal
        self._node = node
        self._agents = agents
        self._heartbeat_s = heartbeat_s

    def _open(self, cursor: str, follow: bool) -> MergedStream:
        places = _unpacked(cursor)
        return MergedStream(
            self._journal, self._node, self._agents, places, follow, self._heartbeat_s, left=self._has_left
        )


class _Source:
    """The events of one node that are not told yet, oldest first. `is_live`: its past is here, or nobody knows it."""

    def __init__(self, node: str, cursor: str, news: asyncio.Event) -> None:
        self.node = node
        self.cursor = cursor
        self.is_live = False
        self._news = news
        self._waiting: deque[tuple[str, Entry]] = deque()
        self._room = asyncio.Event()

    @property
    def first_at(self) -> str | None:
        """The time of the oldest one; None without any."""
        return self._waiting[0][0] if self._waiting else None

    async def put(self, entry: Entry) -> None:
        """Add one, when there is room."""
        while len(self._waiting) >= _AHEAD:
            self._room.clear()
            await self._room.wait()
        self._waiting.append((_time_of(entry.line), entry))
        self.cursor = entry.cursor
        self._news.set()

    def take(self) -> Entry:
        """The oldest one."""
        self._room.set()
        return self._waiting.popleft()[1]

    def live(self) -> None:
        """Its past is told."""
        self.is_live = True
        self._news.set()


class MergedStream:
    """One reader's. `places`: the cursor of each node that it has read."""

    def __init__(
        self,
        journal: Journal,
        node: str,
        agents: Agents,
        places: dict[str, str],
        follow: bool,
        heartbeat_s: float,
        left: Callable[[MergedStream], None],
    ) -> None:
        self._journal = journal
        self._node = node
        self._agents = agents
        self._places = places
        self._heartbeat_s = heartbeat_s
        self._left = left
        self._over = not follow
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._sources: dict[str, _Source] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._reader = JournalReader(journal.folder, places.get(node, ""))

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
        self._news.set()

    # -- reading -------------------------------------------------------------------------------------------

    async def _serve(self, send: Send) -> None:
        with self._journal.followed() as self._changed:
            async with asyncio.TaskGroup() as tasks:
                self._readers.append(tasks.create_task(self._read_own(self._source(self._node))))
                self._readers.append(tasks.create_task(self._look_for_nodes(tasks)))
                await self._tell(send)
                for reader in self._readers:
                    reader.cancel()

    async def _read_own(self, source: _Source) -> None:
        while True:
            self._changed.clear()
            entries = self._reader.read()
            for entry in entries:
                await source.put(entry)
            if not entries:
                source.live()
                await self._changed.wait()

    async def _look_for_nodes(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            for node in self._agents.clients():
                if node not in self._sources:
                    self._readers.append(tasks.create_task(self._read_other(self._source(node))))
            await asyncio.sleep(_LOOK_S)

    async def _read_other(self, source: _Source) -> None:
        """Read a node's events, from where we are, again and again."""
        failures = 0
        while True:
            try:
                if (client := self._agents.clients().get(source.node)) is not None:
                    await self._follow(client, source)
                failures = 0
            except (Unreachable, PdctlError, TimeoutError):
                failures += 1
            source.live()
            await asyncio.sleep(min(_AGAIN_S, 0.1 * 2 ** min(failures, 8)) * (0.5 + random.random() / 2))  # noqa: S311

    async def _follow(self, client: AgentClient, source: _Source) -> None:
        """Read one stream to its end. Raises Unreachable, PdctlError, TimeoutError."""
        query = f"?{urlencode({'after': source.cursor})}" if source.cursor else ""
        exchange = await client.stream(f"/v1/events{query}")
        try:
            lines = _Lines(exchange)
            cursor = ""
            while (line := await lines.read(_SILENT_S if source.is_live else CALL_S)) is not None:
                name, _, value = line.partition(b": ")
                if name == b"id":
                    cursor = value.decode("latin-1")
                elif name == b"data" and cursor:
                    await source.put(Entry(cursor, value))
                elif line == UP_TO_DATE.rstrip():
                    source.live()
        finally:
            exchange.close()

    def _source(self, node: str) -> _Source:
        source = self._sources[node] = _Source(node, self._places.get(node, ""), self._news)
        return source

    # -- telling -------------------------------------------------------------------------------------------

    async def _tell(self, send: Send) -> None:
        """Send what there is, in order, and a sign of life where there is nothing."""
        while True:
            self._news.clear()
            while (source := self._next()) is not None:
                await self._send(send, source)
            if self._over and self._is_told:
                await send_part(send, b"", last=True)
                return
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._news.wait()
            except TimeoutError:
                await send_part(send, HEARTBEAT)

    def _next(self) -> _Source | None:
        """The node with the oldest event; None while one that may have an older one has not told its past."""
        if any(not source.is_live and source.first_at is None for source in self._sources.values()):
            return None
        told = [(source.first_at, source.node) for source in self._sources.values() if source.first_at is not None]
        return self._sources[min(told)[1]] if told else None

    @property
    def _is_told(self) -> bool:
        """Whether everything that had happened is told."""
        known = self._sources.keys() >= {self._node, *self._agents.clients()}
        return known and all(source.is_live and source.first_at is None for source in self._sources.values())

    async def _send(self, send: Send, source: _Source) -> None:
        entry = source.take()
        self._places[source.node] = entry.cursor
        line = b'%b, "node": %b}' % (entry.line.rstrip()[:-1], json.dumps(source.node).encode())
        await send_part(send, b"id: %b\ndata: %b\n\n" % (_packed(self._places).encode(), line))


class _Lines:
    """An answer's lines, read one by one."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rest = b""
        self._lines: deque[bytes] = deque()

    async def read(self, within_s: float) -> bytes | None:
        """The next line without its end; None at the end. Raises TimeoutError, and Unreachable."""
        while not self._lines:
            async with asyncio.timeout(within_s):
                data = await self._exchange.read()
            if data is None:
                return None
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
            if len(self._rest) > _LONGEST_LINE:
                raise Unreachable(f"a line of events is longer than {_LONGEST_LINE} bytes", sent=True)
        return self._lines.popleft()


def _packed(places: dict[str, str]) -> str:
    return ",".join(f"{quote(node, safe='')}:{cursor}" for node, cursor in sorted(places.items()))


def _unpacked(cursor: str) -> dict[str, str]:
    """The cursor of each node. Raises BadCursor."""
    places: dict[str, str] = {}
    for part in cursor.split(",") if cursor else ():
        if (found := _CURSOR.fullmatch(part)) is None:
            raise BadCursor(f"{cursor!r} is no cursor of a cluster: take one from an event's id")
        places[unquote(found[1])] = found[2]
    return places


class _At(msgspec.Struct):
    at: str = ""


def _time_of(line: bytes) -> str:
    """When it happened; as old as can be if it does not say."""
    try:
        return msgspec.json.decode(line, type=_At).at
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
