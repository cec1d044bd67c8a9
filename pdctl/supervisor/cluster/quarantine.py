"""Request bodies that killed engines, refused by the proxies of all nodes: their digests are in the registry."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Never

import msgspec

from pdctl.registry import Change, Created, LeaseGone, Put, Registry, Unavailable
from pdctl.registry.mirror import follow, pause_s
from pdctl.supervisor.cluster.entries import Keys

# The proxies are asked this often. They find a body only when it has killed two engines.
_PERIOD_S = 0.5
# A body that is refused for less than this is not told.
_LEAST_S = 1.0
# Bodies that are kept in the registry, and by this node.
_MOST = 1024


class QuarantineEntry(msgspec.Struct, frozen=True):
    """A body in quarantine, under its digest. `left_s`: for how long, when it was written; then its lease ends."""

    node: str
    left_s: float


class SharedQuarantine:
    """`exchange` tells this node's proxies which bodies are in quarantine with the seconds left, nothing if that is not
    known (None), and returns what they have found themselves. `told` is called with None while the registry is heard,
    else with why not."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        exchange: Callable[[dict[str, float] | None], Awaitable[dict[str, float]]],
        told: Callable[[str | None], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._prefix = keys.quarantine
        self._node = node
        self._exchange = exchange
        self._told = told
        self._clock = clock
        # Until when bodies are refused: as the registry says, and as our own proxies found.
        self._known: dict[str, float] = {}
        self._found: dict[str, float] = {}
        self._is_listed = False
        self._news = asyncio.Event()

    async def run_forever(self) -> Never:
        """Exchange bodies until cancelled. Raises Refused."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(self._registry, self._prefix, self._take, self._state))
            tasks.create_task(self._exchange_forever())
            tasks.create_task(self._write_forever())
        raise AssertionError("all tasks run for ever")

    def _state(self, failure: str | None) -> None:
        self._is_listed = self._is_listed or failure is None
        self._told(failure)

    def _take(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            name = change.key.removeprefix(self._prefix)
            entry = _entry_of(change)
            if change.entry is None:
                self._known.pop(name, None)
            elif entry is not None and _is_digest(name) and len(self._known) < _MOST:
                self._known[name] = self._clock() + entry.left_s
        self._news.set()

    async def _exchange_forever(self) -> Never:
        while True:
            now = self._clock()
            told = {name: until - now for name, until in self._known.items() if until > now}
            # Before the first list we know nothing: then the proxies keep what an earlier agent told them.
            found = await self._exchange(told if self._is_listed else None)
            now = self._clock()
            newest = sorted(found.items(), key=lambda body: -body[1])[:_MOST]
            self._found = {name: now + left_s for name, left_s in newest}
            if self._missing():
                self._news.set()
            await asyncio.sleep(_PERIOD_S)

    async def _write_forever(self) -> Never:
        """Write what our proxies found and the registry does not have; nobody waits for it."""
        failures = 0
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                for name in self._missing():
                    await self._write(name)
                failures = 0
            except (Unavailable, LeaseGone):
                self._news.set()
                failures += 1
                await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret

    def _missing(self) -> list[str]:
        """Ours that the registry does not have. When it is full, none."""
        now, room = self._clock(), _MOST - len(self._known)
        found = [name for name, until in self._found.items() if until - now > _LEAST_S and name not in self._known]
        return found[: max(0, room)]

    async def _write(self, name: str) -> None:
        left_s = self._found.get(name, 0.0) - self._clock()
        if left_s <= _LEAST_S:
            return
        lease = await self._registry.grant(math.ceil(left_s))
        key, entry = f"{self._prefix}{name}", QuarantineEntry(self._node, left_s)
        written = await self._registry.write([Put(key, msgspec.json.encode(entry), lease)], [Created(key, 0)])
        if written is None:
            # Another proxy found it, too.
            await self._registry.revoke(lease)
        # Until the watch tells it: it is not written again meanwhile.
        self._known.setdefault(name, self._clock() + left_s)


def _entry_of(change: Change) -> QuarantineEntry | None:
    """What a change tells; None for something that this version does not understand."""
    try:
        return msgspec.json.decode(change.entry.value, type=QuarantineEntry) if change.entry is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_digest(name: str) -> bool:
    try:
        return len(bytes.fromhex(name)) == 16
    except ValueError:
        return False
