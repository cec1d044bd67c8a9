"""Host memory of one engine, for blocks that its pool gives up: the ones that were used last, as many as fit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from pdctl.engine.cache.idle import Idle
from pdctl.engine.tiers import Rows, TierCounts, TierRefused


class HostTier:
    """See Tier. `capacity`: blocks of `block_bytes`; `quota`: see Idle. `pinned`: memory that a GPU copies to and from
    directly."""

    name = "host"
    is_there = True

    def __init__(self, capacity: int, block_bytes: int, quota: int = 0, pinned: bool = False) -> None:
        self.counts = TierCounts()
        try:
            self._rows: Rows = torch.empty((capacity, block_bytes), dtype=torch.uint8, pin_memory=pinned).numpy()
        except RuntimeError as failure:
            raise TierRefused(f"no host memory of {capacity * block_bytes / 2**30:.2f} GiB: {failure}") from failure
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._kept: Idle[bytes] = Idle(quota)
        # Names that came or went. The step loop reads it, and must not wait for a copy.
        self._changed: deque[bytes] = deque()
        # Copies happen under it: a slot must not get another block meanwhile.
        self._lock = threading.Lock()

    @property
    def num_blocks(self) -> int:
        """See Tier.num_blocks."""
        return len(self._slot_of)

    def leading(self, names: Sequence[bytes]) -> int:
        """See Tier.leading."""
        with self._lock:
            return self._leading(names)

    def missing(self, names: Sequence[bytes]) -> list[bool]:
        """See Tier.missing. Those that are there were used again."""
        with self._lock:
            found = [name not in self._slot_of for name in names]
            for name, is_missing in zip(names, found, strict=True):
                if not is_missing:
                    self._kept.use(name)
            return found

    def get(self, names: Sequence[bytes]) -> Rows:
        """See Tier.get."""
        with self._lock:
            found = names[: self._leading(names)]
            for name in reversed(found):
                self._kept.use(name)
            self.counts.loaded += len(found)
            return self._rows[[self._slot_of[name] for name in found]]

    def put(self, names: Sequence[bytes], rows: Rows, tenants: Sequence[str]) -> None:
        """See Tier.put. Ends of chains are given up before their beginnings."""
        with self._lock:
            for name, row, tenant in reversed(list(zip(names, rows, tenants, strict=True))):
                if name in self._slot_of:
                    self._kept.use(name)
                    continue
                if not self._free:
                    self._give_up()
                slot = self._free.pop()
                self._rows[slot] = row
                self._slot_of[name] = slot
                self._kept.put(name, tenant)
                self._changed.append(name)
                self.counts.stored += 1

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """See Tier.changes."""
        names = dict.fromkeys(self._changed.popleft() for _ in range(len(self._changed)))
        # As it is now: a later change of a name is noted again.
        is_here = {name: name in self._slot_of for name in names}
        return [name for name, here in is_here.items() if here], [name for name, here in is_here.items() if not here]

    def close(self) -> None:
        """See Tier.close."""

    def audit(self) -> None:
        """Check that each slot is free or has one block."""
        with self._lock:
            slots = [*self._free, *self._slot_of.values()]
            assert sorted(slots) == list(range(len(self._rows))), "a slot is lost, or used twice"
            assert self._kept.keys() == self._slot_of.keys()
            self._kept.audit()

    def _leading(self, names: Sequence[bytes]) -> int:
        return next((number for number, name in enumerate(names) if name not in self._slot_of), len(names))

    def _give_up(self) -> None:
        name = self._kept.pop()
        self._free.append(self._slot_of.pop(name))
        self._changed.append(name)


def capacity_of(gigabytes: float, block_bytes: int) -> int:
    """Blocks that fit."""
    return int(gigabytes * 2**30) // block_bytes
