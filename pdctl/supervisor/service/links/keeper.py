"""Keeps pairs of engines linked, for kinds whose engines do not keep their links themselves (LINK without STATE).

A link belongs to one start of each engine: after a restart it is made again. Each pair is linked by one call at a time,
few pairs at once, each with a deadline; a failure is tried again later and later. The proxies are told which pairs are
not linked, because a decode engine of such a kind waits for ever for KV that it cannot read.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from pdctl.adapters import Ability, Peer
from pdctl.net.http_client import Unreachable
from pdctl.proxy_wire import EngineAddress
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.kv import KvWatch, Member, pairs_among
from pdctl.supervisor.service.links.attached import AttachedEngines
from pdctl.wire import LinkInfo

LINKS = "links.json"
_LOOK_S = 0.25
_LINK_S = 60.0
_DROP_S = 5.0
_AT_ONCE = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

Pair = tuple[str, str]


class Joined(msgspec.Struct, frozen=True):
    """A pair that is linked: names of reader and server, and the start of each that the link belongs to."""

    reader: str
    server: str
    reader_epoch: str
    server_epoch: str


@dataclass(slots=True)
class _Tries:
    """Failures since the last success, and when the next try is due (monotonic)."""

    failures: int = 0
    due: float = 0.0


@dataclass(slots=True)
class LinkKeeper:
    """`started` returns the ready engines that pdctl started, `names` those of all engines of the service; `changed`
    tells the proxies."""

    kv: KvWatch
    started: Callable[[], list[Member]]
    attached: AttachedEngines
    names: Callable[[], set[str]]
    changed: Callable[[], Awaitable[None]]
    run_dir: RunDir
    joined: dict[Pair, Joined] = field(default_factory=dict)
    _tries: dict[Pair, _Tries] = field(default_factory=dict)
    _known: dict[str, Member] = field(default_factory=dict)
    _limit: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    _tasks: set[Pair] = field(default_factory=set)

    def load(self) -> None:
        """Take over the links that an earlier supervisor has made: making them again would break running requests."""
        try:
            found = msgspec.json.decode((self.run_dir.path / LINKS).read_bytes(), type=list[Joined])
        except (OSError, msgspec.DecodeError):
            return
        self.joined = {(one.reader, one.server): one for one in found}

    def unlinked(self, addresses: Sequence[EngineAddress]) -> dict[str, list[str]]:
        """By decode engine, the prefill engines from which it cannot read now."""
        members = [Member(one.name, one.kind, one.role, one.host, one.port, "") for one in addresses]
        found: dict[str, list[str]] = {}
        for reader, server in pairs_among([member for member in members if _is_kept(member)]):
            if (reader.name, server.name) not in self.joined:
                found.setdefault(reader.name, []).append(server.name)
        return found

    def died(self, name: str) -> bool:
        """An engine has ended, and its links with it. Returns whether it had any."""
        gone = [pair for pair in self.joined if name in pair]
        for pair in gone:
            del self.joined[pair]
        return bool(gone)

    async def link(self, name: str) -> None:
        """Link an engine that has just become ready with its peers; one try each. Returns when all have ended."""
        pairs = [pair for pair in self._pairs() if name in (pair[0].name, pair[1].name)]
        await self._link_all(pairs)

    async def keep_forever(self) -> None:
        """Look after attached engines, and try again what failed, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self.look(tasks)
                await asyncio.sleep(_LOOK_S)

    async def look(self, tasks: asyncio.TaskGroup | None = None) -> None:
        """Find the pairs whose engines were restarted, are new or are gone, and start to link them; without `tasks`,
        return when they are linked."""
        await self.attached.look()
        now, pairs = time.monotonic(), self._pairs()
        await self._drop_removed()
        ended = [pair for pair, one in self.joined.items() if not self._is_current(one)]
        for pair in ended:
            del self.joined[pair]
        if ended:
            await self._told()
        due = [pair for pair in pairs if self._tries.get(_names(pair), _Tries()).due <= now]
        if tasks is None:
            await self._link_all(due)
        elif due:
            tasks.create_task(self._link_all(due))

    # -- parts ---------------------------------------------------------------------------------------------

    def _members(self) -> list[Member]:
        found = [member for member in (*self.started(), *self.attached.members()) if _is_kept(member)]
        self._known |= {member.name: member for member in found}
        return found

    def _pairs(self) -> list[tuple[Member, Member]]:
        """Those that are to be linked, and that nobody links now."""
        return [
            pair
            for pair in pairs_among(self._members())
            if _names(pair) not in self._tasks and self.joined.get(_names(pair)) != _joined(pair)
        ]

    def _is_current(self, one: Joined) -> bool:
        """Whether both starts of a link are those that run. An engine that is silent for a moment keeps its links."""
        for name, epoch in ((one.reader, one.reader_epoch), (one.server, one.server_epoch)):
            member = self._known.get(name)
            if member is None or member.epoch != epoch:
                return False
        return True

    async def _drop_removed(self) -> None:
        """End the links of engines that are no longer part of the service."""
        gone = self._known.keys() - self.names()
        if not gone:
            return
        pairs = [pair for pair in self._tries if not gone.isdisjoint(pair)]
        # All at once: an engine whose host is gone takes each call the whole time.
        async with asyncio.TaskGroup() as tasks:
            for reader, server in pairs:
                self._forget(reader, server)
                if reader in self._known and server in self._known:
                    tasks.create_task(self._drop(self._known[reader], self._known[server]))
        for name in gone:
            del self._known[name]

    def _forget(self, reader: str, server: str) -> None:
        self._tries.pop((reader, server), None)
        self.joined.pop((reader, server), None)
        self.kv.forget_pair((reader, server))

    async def _drop(self, reader: Member, server: Member) -> None:
        """End a link that is no longer wanted."""
        async with self._limit:
            await reader.control.unlink(self.kv.target(reader), Peer(server.peer, self.kv.target(server)), _DROP_S)

    async def _link_all(self, pairs: list[tuple[Member, Member]]) -> None:
        if not pairs:
            return
        names = {_names(pair) for pair in pairs}
        self._tasks |= names
        try:
            async with asyncio.TaskGroup() as tasks:
                for reader, server in pairs:
                    tasks.create_task(self._link(reader, server))
        finally:
            self._tasks -= names
        await self._told()

    async def _link(self, reader: Member, server: Member) -> None:
        pair, peer = (reader.name, server.name), Peer(server.peer, self.kv.target(server))
        async with self._limit:
            if self._may_exist(reader, server):
                await reader.control.unlink(self.kv.target(reader), peer, _DROP_S)
            try:
                [made] = await reader.control.link(self.kv.target(reader), [peer], _LINK_S)
            except Unreachable as failure:
                made = LinkInfo(server.name, server.epoch, error=str(failure))
        if not self.names().issuperset(pair):
            # One of them was removed meanwhile.
            self._forget(*pair)
            await self._drop(reader, server)
            return
        self.kv.note(reader.name, made)
        tries = self._tries.setdefault(pair, _Tries())
        if made.error:
            tries.failures += 1
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(tries.failures - 1, 10))
            # KV that does not fit does not fit later either, unless an engine is started anew.
            pause_s = _LONGEST_PAUSE_S if made.refused else pause_s * (0.5 + random.random() / 2)  # noqa: S311 - jitter
            tries.due = time.monotonic() + pause_s
            return
        tries.failures, tries.due = 0, 0.0
        one = _joined((reader, server))
        if self._is_current(one):
            self.joined[pair] = one

    def _may_exist(self, reader: Member, server: Member) -> bool:
        """Whether an engine may still have its end of an earlier link. Both are new at the service's own start."""
        by_us = reader.secret is None and server.secret is None
        return not by_us or (reader.name, server.name) in self._tries

    async def _told(self) -> None:
        # Without the file, a later supervisor makes the links again.
        with contextlib.suppress(OSError):
            self.run_dir.write_json(LINKS, msgspec.to_builtins(list(self.joined.values())))
        await self.changed()


def _is_kept(member: Member) -> bool:
    """Whether the supervisor keeps the links of an engine."""
    faces = member.control
    keeps = Ability.LINK in faces.abilities and Ability.STATE not in faces.abilities
    return keeps and (member.role != "hybrid" or faces.links_hybrids)


def _names(pair: tuple[Member, Member]) -> Pair:
    return (pair[0].name, pair[1].name)


def _joined(pair: tuple[Member, Member]) -> Joined:
    reader, server = pair
    return Joined(reader.name, server.name, reader.epoch, server.epoch)
