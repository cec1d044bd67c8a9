"""One node at a time drains and restarts engines: the others serve meanwhile.

The node whose turn it is has a key in the registry, under a lease of its own. If it dies, the lease ends.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Never

from pdctl.errors import PdctlError
from pdctl.registry import Created, LeaseGone, Put, Registry, Unavailable
from pdctl.supervisor.cluster.entries import Keys

# Of a lease's time: between two renewals.
_KEEP_PART = 1 / 3
# Whoever waits looks this often, seconds.
_LOOK_S = 1.0


class Turns:
    """`node`: ours. `waiting` is called with the node that is waited for, each time it is another one."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        ttl_s: int,
        waiting: Callable[[str], None],
        look_s: float = _LOOK_S,
    ) -> None:
        self._registry = registry
        self._key = keys.turn
        self._node = node
        self._ttl_s = ttl_s
        self._waiting = waiting
        self._look_s = look_s

    async def act(self, act: Callable[[], Awaitable[None]], give_up: Callable[[], bool]) -> None:
        """Await `act` when it is this node's turn; do nothing once `give_up` holds. Raises as `act` does, or Refused.

        The turn may be lost meanwhile, if the registry is away for long: what was begun is finished.
        """
        lease = await self._until_ours(give_up)
        if lease is None:
            return
        failure: PdctlError | None = None
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep_forever(lease))
            try:
                await act()
            except PdctlError as failed:
                failure = failed
            finally:
                keeping.cancel()
                await self._end(lease)
        if failure is not None:
            raise failure

    async def _until_ours(self, give_up: Callable[[], bool]) -> int | None:
        told = ""
        while not give_up():
            try:
                if (lease := await self._try()) is not None:
                    return lease
                if (holder := await self._holder()) not in (told, ""):
                    told = holder
                    self._waiting(holder)
            except (Unavailable, LeaseGone):
                pass  # without the registry, nothing is changed
            await asyncio.sleep(self._look_s * (0.5 + random.random()))  # noqa: S311 - jitter, no secret
        return None

    async def _try(self) -> int | None:
        """A lease with our key; None if it is another node's turn. If the answer is lost, that lease ends by itself."""
        if await self._holder():
            return None
        lease = await self._registry.grant(self._ttl_s)
        put = Put(self._key, self._node.encode(), lease)
        if await self._registry.write([put], [Created(self._key, 0)]) is not None:
            return lease
        await self._end(lease)
        return None

    async def _holder(self) -> str:
        found = await self._registry.list(self._key)
        return next((entry.value.decode(errors="replace") for entry in found.entries if entry.key == self._key), "")

    async def _keep_forever(self, lease: int) -> Never:
        while True:
            await asyncio.sleep(self._ttl_s * _KEEP_PART)
            try:
                await self._registry.keep(lease)
            except (Unavailable, LeaseGone):
                continue

    async def _end(self, lease: int) -> None:
        try:
            await self._registry.revoke(lease)
        except Unavailable:
            return  # it ends by itself
