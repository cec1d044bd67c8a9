"""Engines of other nodes, in the words of the parts of a service that use them. On one machine there are none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Never, Protocol

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.net.identity import ContextFactory
from pdctl.plan.spec import PROXY
from pdctl.proxy_wire import EngineAddress
from pdctl.supervisor.cluster.entries import DRAINING, EngineEntry
from pdctl.supervisor.service.kv import KvWatch, Member

if TYPE_CHECKING:
    from pdctl.supervisor.service.running import RunningService
    from pdctl.supervisor.surface.controlled import Controlled


class ClusterSide(Protocol):
    """The rest of the cluster, for the service of one node. `secret`: what all processes of the service share;
    `refused_order`: why this node does not run what it is to run, else None; `tls`: of a cluster with certificates."""

    secret: str
    refused_order: str | None
    tls: ContextFactory | None

    def used(self) -> tuple[EngineEntry, ...]:
        """Engines of other nodes that may get requests, or that drain."""
        ...

    def engines_changed(self) -> None:
        """An engine of this node is new, has changed or has gone."""
        ...

    async def calls_elsewhere(self, engine: str) -> int:
        """Calls that proxies of other nodes have at an engine of this node."""
        ...

    def control(self, running: RunningService) -> Controlled:
        """What the control API of this node answers with."""
        ...

    async def run_forever(self, running: RunningService) -> None:
        """Be a part of the cluster until cancelled."""
        ...

    async def leave(self) -> None:
        """Tell the others that this node stops."""
        ...


class Others:
    """`used` returns engines and proxies; engines of a kind that this pdctl does not know are left out. `certificates`:
    the cluster has them, so engines of kinds that can are called by TLS, whatever the registry says."""

    def __init__(self, used: Callable[[], tuple[EngineEntry, ...]] = tuple, certificates: bool = False) -> None:
        self._used = used
        self._certificates = certificates

    def entries(self) -> list[EngineEntry]:
        """All engines."""
        known = set(kinds())
        return [entry for entry in self._used() if entry.is_engine and entry.kind in known]

    def members(self) -> list[Member]:
        """As members, which can be called."""
        return [self.member_of(entry) for entry in self.entries()]

    def addresses(self) -> list[EngineAddress]:
        """As the proxies need them."""
        return [_address(entry, self._tls(entry)) for entry in self.entries()]

    def draining(self) -> set[str]:
        """The names of those that get no new requests."""
        return {entry.name for entry in self.entries() if entry.state == DRAINING}

    def holders(self) -> set[str]:
        """The names under which they, and the proxies of other nodes, hold leases."""
        return {entry.holder for entry in self._used()}

    def member_of(self, entry: EngineEntry) -> Member:
        """An engine of another node as a member."""
        return Member(
            entry.name, entry.kind, entry.role, entry.host, entry.port, entry.epoch, role_epoch=entry.role_epoch,
            tls=self._tls(entry),
        )  # fmt: skip

    def _tls(self, entry: EngineEntry) -> bool:
        """What a node tells of itself cannot make others call it without TLS."""
        is_ours = entry.kind == PROXY or (can_launch(entry.kind) and launcher(entry.kind).certified)
        return self._certificates and is_ours


class OthersKeeper:
    """Acts on news of other nodes' engines: tells the proxies, links this node's readers to them, and releases what
    those that are gone held here."""

    def __init__(self, others: Others, kv: KvWatch, tell: Callable[[], Awaitable[None]]) -> None:
        self._others = others
        self._kv = kv
        self._tell = tell
        self._linked: dict[str, str] = {}
        self._gone: set[str] = set()
        self._changed = asyncio.Event()
        self._left = asyncio.Event()

    def changed(self) -> None:
        """Other engines are to be used than before."""
        self._changed.set()

    def release(self, holders: Collection[str]) -> None:
        """These holders are gone."""
        self._gone |= set(holders)
        self._left.set()

    async def run_forever(self) -> Never:
        """Act until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._release_forever())
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._tell()
                self._link(tasks)
        raise AssertionError("it runs for ever")

    def _link(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to link readers of this node to engines that are new, or were started anew."""
        now = {entry.name: entry.holder for entry in self._others.entries()}
        for name in self._linked.keys() - now.keys():
            self._kv.forget(name)
        new = [name for name, holder in now.items() if self._linked.get(name) != holder]
        self._linked = now
        for name in new:
            tasks.create_task(self._kv.link(name))

    async def _release_forever(self) -> Never:
        while True:
            await self._left.wait()
            self._left.clear()
            gone, self._gone = self._gone, set()
            await self._kv.release_here(gone)


def _address(entry: EngineEntry, tls: bool) -> EngineAddress:
    return EngineAddress(
        entry.name, entry.role, entry.kind, entry.host, entry.port, connector=entry.connector,
        ports=dict(entry.ports), inline=entry.inline, role_epoch=entry.role_epoch, tls=tls,
    )  # fmt: skip
