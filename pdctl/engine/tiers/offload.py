"""Copies blocks that nobody uses to a tier, in a thread of its own. The step loop never waits for it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdctl.engine.lifeline import vital
from pdctl.engine.tiers import Rows, Tier, TierFailed

_log = logging.getLogger(__name__)

# Blocks that wait for a tier, and those that are copied at once.
_MOST_WAITING, _AT_ONCE = 4096, 32


class IdleBlock(NamedTuple):
    """A block that nobody uses: its content is that of `name` as long as its life (see BlockAllocator) is `life`."""

    block: int
    name: bytes
    tenant: str
    life: int


class Offload:
    """Of one tier. `read`: copies blocks; `life`: of a block, now. `dropped`: blocks that did not wait long enough."""

    def __init__(self, tier: Tier, read: Callable[[Sequence[int]], Rows], life: Callable[[int], int]) -> None:
        self.dropped = 0
        self._tier = tier
        self._read = read
        self._life = life
        self._waiting: OrderedDict[bytes, IdleBlock] = OrderedDict()
        self._changed = threading.Condition()
        self._closing = False
        self._busy = False
        self._thread = threading.Thread(target=vital(self._run), name=f"offload-{tier.name}", daemon=True)
        self._thread.start()

    def put(self, blocks: Sequence[IdleBlock]) -> None:
        """Copy these later. The ones that have waited longest are dropped when there are too many."""
        if not self._tier.is_there:
            self.dropped += len(blocks)
            return
        with self._changed:
            for one in blocks:
                self._waiting[one.name] = one
            while len(self._waiting) > _MOST_WAITING:
                self._waiting.popitem(last=False)
                self.dropped += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Copy no more."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()

    def wait_until_done(self, timeout_s: float) -> bool:
        """Wait until nothing waits (for tests)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def _run(self) -> None:
        while batch := self._taken():
            try:
                self._copy(batch)
            except TierFailed as failure:
                self.dropped += len(batch)
                _log.info("%d blocks of KV are not kept: %s", len(batch), failure)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _taken(self) -> list[IdleBlock]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return []
            self._busy = True
            return [self._waiting.popitem(last=False)[1] for _ in range(min(_AT_ONCE, len(self._waiting)))]

    def _copy(self, batch: Sequence[IdleBlock]) -> None:
        missing = self._tier.missing([one.name for one in batch])
        wanted = [one for one, is_missing in zip(batch, missing, strict=True) if is_missing]
        if not wanted:
            return
        rows = self._read([one.block for one in wanted])
        # A block that was given up while it was copied, or before, may have other content.
        right = [number for number, one in enumerate(wanted) if self._life(one.block) == one.life]
        self.dropped += len(wanted) - len(right)
        if right:
            kept = [wanted[number] for number in right]
            self._tier.put([one.name for one in kept], rows[right], [one.tenant for one in kept])
