"""The engines of other nodes as this node uses them: what the registry tells of them, and their own answers if it does
not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Never

from pdctl.registry import Change, Registry
from pdctl.registry.mirror import Mirror, follow
from pdctl.supervisor.cluster.entries import EngineEntry, Keys
from pdctl.supervisor.cluster.membership import Membership

# Engines of which the registry tells nothing are asked this often, so many at once. One that has not answered after
# `_ANSWER_S` does not answer: it may be frozen. Leases of a lost node end within a second after the registry's lease,
# which may end half a second late. For a slow engine this costs prefills, and it is asked again.
_ASK_S = 1.0
_ANSWER_S = 0.5
_AT_ONCE = 16


class Neighbours:
    """`ask` returns an engine's epoch, or None if it does not answer; `release` ends the leases of holders at this
    node's engines; `changed` is called when other engines are to be used than before; `told` with None while the
    registry is heard, else with why not."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        membership: Membership,
        ask: Callable[[EngineEntry], Awaitable[str | None]],
        release: Callable[[list[str]], None],
        changed: Callable[[], None],
        told: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._membership = membership
        self._ask = ask
        self._release = release
        self._changed = changed
        self._told = told
        self._clock = clock
        self._version = membership.version
        self._mirror = Mirror()
        self._unknown = asyncio.Event()
        self._limit = asyncio.Semaphore(_AT_ONCE)

    @property
    def used(self) -> tuple[EngineEntry, ...]:
        """Engines of other nodes that may get requests, or that drain; by name."""
        return self._membership.used

    async def run_forever(self) -> Never:
        """Follow the registry, and ask engines that it does not know any more, until cancelled. Raises Refused."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(self._registry, self._keys.engines, self._take, self._told, self._mirror))
            tasks.create_task(self._ask_forever())
        raise AssertionError("both tasks run for ever")

    def _take(self, changes: tuple[Change, ...]) -> None:
        self._heard(self._membership.take(changes, self._clock()))

    def _heard(self, holders: list[str]) -> None:
        if holders:
            self._release(holders)
        if self._membership.unknown:
            self._unknown.set()
        # When a fleet starts, thousands of news come one by one: the list is made when somebody wants it.
        if self._membership.version != self._version:
            self._version = self._membership.version
            self._changed()

    async def _ask_forever(self) -> Never:
        while True:
            await self._unknown.wait()
            self._unknown.clear()
            async with asyncio.TaskGroup() as tasks:
                for entry in self._membership.unknown:
                    tasks.create_task(self._ask_one(entry))
            self._heard(self._membership.forget(self._clock()))
            await asyncio.sleep(_ASK_S)

    async def _ask_one(self, entry: EngineEntry) -> None:
        epoch = None
        with contextlib.suppress(TimeoutError):
            async with self._limit, asyncio.timeout(_ANSWER_S):
                epoch = await self._ask(entry)
        self._heard(self._membership.asked(entry, epoch))
