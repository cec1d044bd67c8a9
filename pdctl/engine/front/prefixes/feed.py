"""Tells others what can be found here: each asks for what has changed since its last answer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from itertools import islice

from pdctl.engine.front.kv_events import short
from pdctl.engine.ipc.messages import KvChange, KvStored
from pdctl.wire import BlocksCall, BlocksReply

# Names of changes that are kept. Who has missed more gets all names.
_KEPT = 65_536
# Changes come with every step: those of so many seconds are told at once.
_TOGETHER_S = 0.02


class Feed:
    """The names of what can be found, and the newest changes. `epoch`: of this start."""

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._names: set[int] = set()
        self._changes: deque[tuple[bool, list[int]]] = deque()
        self._kept = 0
        self._sequence = 0
        self._news = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Answer all who wait: the engine ends."""
        self._closed = True
        self._news.set()

    def note(self, names: list[int], is_stored: bool) -> None:
        """These can be found from now on, or not any more."""
        if is_stored:
            self._names.update(names)
        else:
            self._names.difference_update(names)
        self._changes.append((is_stored, names))
        self._kept += len(names)
        self._sequence += 1
        while self._kept > _KEPT:
            self._kept -= len(self._changes.popleft()[1])
        self._news.set()

    def has(self, name: int) -> bool:
        """Whether it can be found."""
        return name in self._names

    async def after(self, call: BlocksCall) -> BlocksReply:
        """What has changed since the caller's last answer; nothing, if it takes too long."""
        if call.wait_s and call.epoch == self._epoch and call.after == self._sequence:
            try:
                async with asyncio.timeout(call.wait_s):
                    while call.after == self._sequence and not self._closed:
                        self._news.clear()
                        await self._news.wait()
                    await asyncio.sleep(0.0 if self._closed else _TOGETHER_S)
            except TimeoutError:
                pass
        return self._since(call)

    def _since(self, call: BlocksCall) -> BlocksReply:
        missed = self._sequence - call.after
        if call.epoch != self._epoch or not 0 <= missed <= len(self._changes):
            return BlocksReply(self._epoch, self._sequence, True, sorted(self._names), [])
        # A name that came and went counts as it is now.
        touched = {name for _, names in islice(reversed(self._changes), missed) for name in names}
        stored = touched & self._names
        return BlocksReply(self._epoch, self._sequence, False, sorted(stored), sorted(touched - stored))

    def audit(self) -> None:
        """Check the changes against the names: the last change of each name decides."""
        assert self._kept == sum(len(names) for _, names in self._changes) <= _KEPT, "the number of names is off"
        last = {name: is_stored for is_stored, names in self._changes for name in names}
        assert all((name in self._names) == is_stored for name, is_stored in last.items()), "a change was lost"


class BlockFeed(Feed):
    """Of this engine's blocks."""

    def take(self, changes: Iterable[KvChange]) -> None:
        """Note changes of the prefix cache, in order."""
        for change in changes:
            self.note([short(name) for name in change.names], isinstance(change, KvStored))
