"""The allocator of KV blocks: which block belongs to which sequence. It handles only ids.

Contiguous runs of blocks are preferred: attention reads a run without gathering, and a transfer moves it as one
span.
"""

from __future__ import annotations

from collections.abc import Callable


class BlockAllocator:
    """Manages ids 0 to num_blocks - 1. Every block is free, has exactly one owner, or is quarantined.

    `on_free` is called with blocks that have just been freed (used by the debug option that poisons them).
    """

    def __init__(self, num_blocks: int, on_free: Callable[[list[int]], None] | None = None) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._free = bytearray(b"\1") * num_blocks
        self._owned: dict[str, list[int]] = {}
        self._quarantine: dict[str, list[int]] = {}
        self._on_free = on_free
        self._cursor = 0

    @property
    def num_quarantined(self) -> int:
        """Blocks that a late transfer may still write to."""
        return sum(map(len, self._quarantine.values()))

    def owned(self, owner: str) -> list[int]:
        """The owner's blocks in token order; empty for an unknown owner."""
        return self._owned.get(owner, [])

    def allocate(self, owner: str, count: int) -> list[int] | None:
        """Allocate `count` more blocks for `owner`; None (and no change) if there are too few."""
        if count > self.num_free:
            return None
        mine = self._owned.setdefault(owner, [])
        taken = self._neighbours(mine, count) or self._run(count) or self._scattered(count)
        for block in taken:
            self._free[block] = 0
        self.num_free -= count
        mine.extend(taken)
        return taken

    def free(self, owner: str) -> int:
        """Free all blocks of `owner` and return their number; 0 for an unknown owner."""
        return self._reclaim(self._owned.pop(owner, []))

    def quarantine(self, owner: str) -> None:
        """Quarantine all blocks of `owner` until `settle`."""
        assert owner not in self._quarantine
        self._quarantine[owner] = self._owned.pop(owner, [])

    def settle(self, owner: str) -> int:
        """Free the quarantined blocks of `owner`: nothing can write to them any more. Returns their number."""
        return self._reclaim(self._quarantine.pop(owner, []))

    def audit(self) -> None:
        """Check that each block is exactly once free, owned or quarantined."""
        owned = [*self._owned.values(), *self._quarantine.values()]
        held = [block for blocks in owned for block in blocks]
        assert len(set(held)) == len(held), "a block has two owners"
        assert self.num_free == sum(self._free), "the free count is off"
        assert self.num_free + len(held) == self.num_blocks, "a block is lost"
        assert not any(self._free[block] for block in held), "a block is both free and owned"

    def _reclaim(self, blocks: list[int]) -> int:
        for block in blocks:
            assert not self._free[block], f"block {block} freed twice"
            self._free[block] = 1
        self.num_free += len(blocks)
        if blocks and self._on_free is not None:
            self._on_free(blocks)
        return len(blocks)

    def _neighbours(self, mine: list[int], count: int) -> list[int]:
        """The blocks right after the owner's last one, if all of them are free."""
        start = mine[-1] + 1 if mine else self.num_blocks
        fits = start + count <= self.num_blocks and all(self._free[start : start + count])
        return list(range(start, start + count)) if fits else []

    def _run(self, count: int) -> list[int]:
        """A free run of blocks. New owners are spread out (next fit), so that earlier ones can grow in place."""
        room = count + 8
        for length, start in ((count + room, self._cursor), (count + room, 0), (count, 0)):
            found = self._free.find(b"\1" * length, start)
            if found >= 0:
                self._cursor = found + count + room
                return list(range(found, found + count))
        return []

    def _scattered(self, count: int) -> list[int]:
        taken: list[int] = []
        start = 0
        while len(taken) < count:
            start = self._free.index(1, start)
            taken.append(start)
            start += 1
        return taken
