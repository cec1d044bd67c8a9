"""Tells the registry of this node and its engines, under one lease, and again whenever that is lost.

Nothing waits for it: a registry that does not answer leaves the engines and their streams as they are.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Never

import msgspec

from pdctl.registry import Delete, LeaseGone, Modified, Put, Registry, Unavailable
from pdctl.registry.fence import Fence, NotOurs
from pdctl.registry.mirror import pause_s
from pdctl.supervisor.cluster.entries import GONE, EngineEntry, Keys, NodeEntry, engine_of

# Of a lease's time: between two renewals.
_KEEP_PART = 1 / 3


class Presence:
    """`engines` returns this node's engines as they are now; `told` is called with None when the registry knows all of
    them, else with why it does not."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: NodeEntry,
        ttl_s: int,
        engines: Callable[[], list[EngineEntry]],
        told: Callable[[str | None], None],
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._node = node
        self._ttl_s = ttl_s
        self._engines = engines
        self._told = told
        self._news = asyncio.Event()
        self._lease: int | None = None
        # A write of ours counts only while our node's key is ours.
        self._fence: Fence | None = None
        # None: the entry is one that we cannot read.
        self._written: dict[str, EngineEntry | None] = {}

    def changed(self) -> None:
        """An engine is new, has changed or has gone."""
        self._news.set()

    async def run_forever(self) -> Never:
        """Keep the registry up to date until cancelled."""
        failures = 0
        while True:
            delay_s = self._ttl_s * _KEEP_PART
            try:
                await self._speak()
                self._told(None)
                failures = 0
            except (Unavailable, LeaseGone, NotOurs, _Taken) as failure:
                if isinstance(failure, LeaseGone | NotOurs | _Taken):
                    self._lease = self._fence = None
                self._told(str(failure))
                delay_s = min(delay_s, pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret
                failures += 1
            await self._until_due(delay_s, at_news=failures == 0)

    async def leave(self) -> None:
        """Say that this node's engines are gone, and end the lease. One try: the lease ends by itself."""
        if self._lease is None or self._fence is None:
            return
        try:
            if self._fence.is_unsure:
                await self._settle(self._fence)
            gone = [self._gone(key, entry) for key, entry in self._written.items() if entry is not None]
            if gone:
                await self._fence.write(gone)
            await self._registry.revoke(self._lease)
        except (Unavailable, LeaseGone, NotOurs):
            return

    async def _speak(self) -> None:
        """Renew the lease, or register, and write what has changed."""
        self._news.clear()
        if self._lease is None or self._fence is None:
            self._fence = await self._register()
        else:
            await self._registry.keep(self._lease)
        if self._fence.is_unsure:
            await self._settle(self._fence)
        wanted = {self._keys.engine(entry.node, entry.name): entry for entry in self._engines()}
        puts = [self._put(key, entry) for key, entry in wanted.items() if self._written.get(key) != entry]
        gone = {key: entry for key, entry in self._written.items() if key not in wanted}
        # Two revisions: readers must see that it is gone before they see that nothing is left.
        puts += [self._gone(key, entry) for key, entry in gone.items() if entry is not None]
        if puts:
            await self._fence.write(puts)
        if gone:
            await self._fence.write([Delete(key) for key in gone])
        self._written = {**wanted}

    async def _settle(self, fence: Fence) -> None:
        """After a lost answer: look what has been written."""
        found = await fence.settle(self._keys.engines_of(self._node.name))
        # What an earlier lease holds would end with that.
        ours = [entry for entry in found.entries if entry.lease == self._lease]
        self._written = {entry.key: engine_of(entry) for entry in ours}

    async def _register(self) -> Fence:
        """Take a lease and the node's key. The key of an earlier agent of this node is taken over."""
        key = self._keys.node(self._node.name)
        found = await self._registry.list(key)
        held = next((entry for entry in found.entries if entry.key == key), None)
        if held is not None and not self._is_ours(held.value):
            raise _Taken(f"another machine is registered as node {self._node.name!r}: {_whose(held.value)}")
        lease = await self._registry.grant(self._ttl_s)
        put = Put(key, msgspec.json.encode(self._node), lease)
        revision = await self._registry.write([put], [Modified(key, held.modified if held is not None else 0)])
        if revision is None:
            raise _Taken(f"node {self._node.name!r} was registered by another agent at the same time")
        self._lease, self._written = lease, {}
        return Fence(self._registry, put, held.created if held is not None else revision, revision)

    def _is_ours(self, value: bytes) -> bool:
        try:
            held = msgspec.json.decode(value, type=NodeEntry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        return (held.name, held.boot) == (self._node.name, self._node.boot)

    def _put(self, key: str, entry: EngineEntry) -> Put:
        assert self._lease is not None
        return Put(key, msgspec.json.encode(entry), self._lease)

    def _gone(self, key: str, entry: EngineEntry) -> Put:
        return self._put(key, msgspec.structs.replace(entry, state=GONE))

    async def _until_due(self, delay_s: float, at_news: bool) -> None:
        try:
            async with asyncio.timeout(delay_s):
                if not at_news:
                    await asyncio.sleep(delay_s)
                await self._news.wait()
        except TimeoutError:
            return


def _whose(value: bytes) -> str:
    """Who holds a node's key."""
    try:
        return msgspec.json.decode(value, type=NodeEntry).address
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "one with another version of pdctl"


class _Taken(Exception):
    """Our node's key is another's."""
