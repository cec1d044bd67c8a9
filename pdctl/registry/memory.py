"""The registry of one process: no I/O, gone with the process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Never

from pdctl.registry import Change, Created, Delete, Listing, Modified, Put
from pdctl.registry.store import Store


class MemoryRegistry:
    """A `Registry` over a `Store`. Watchers are woken by writes, and by the end of the next lease."""

    def __init__(self, store: Store | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store or Store()
        self._clock = clock
        self._news = asyncio.Event()

    async def grant(self, ttl_s: int) -> int:
        """As `Registry.grant`. Watchers look again, since this lease may end first."""
        lease = self.store.grant(ttl_s, self._clock())
        self._tell()
        return lease

    async def keep(self, lease: int) -> None:
        """As `Registry.keep`."""
        self.store.keep(lease, self._clock())

    async def revoke(self, lease: int) -> None:
        """As `Registry.revoke`."""
        self.store.revoke(lease)
        self._tell()

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        """As `Registry.write`."""
        self.store.expire(self._clock())
        revision = self.store.write(writes, conditions)
        self._tell()
        return revision

    async def list(self, prefix: str) -> Listing:
        """As `Registry.list`."""
        self.store.expire(self._clock())
        return self.store.listing(prefix)

    async def watch(self, prefix: str, after: int, tell: Callable[[tuple[Change, ...]], None]) -> Never:
        """As `Registry.watch`."""
        while True:
            self.store.expire(self._clock())
            news, groups = self._news, self.store.changes(prefix, after)
            # Changes elsewhere count as heard, too: else they would be looked at again, and be forgotten some day.
            after = max(after, self.store.revision)
            for group in groups:
                tell(group)
            await self._until(news)

    async def close(self) -> None:
        """Nothing is open."""

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, news: asyncio.Event) -> None:
        """Until `news`, or until the next lease ends."""
        ends_at = self.store.next_end()
        delay = None if ends_at is None else max(0.0, ends_at - self._clock())
        try:
            async with asyncio.timeout(delay):
                await news.wait()
        except TimeoutError:
            return
