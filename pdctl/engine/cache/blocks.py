"""The allocator of KV blocks: which block belongs to which sequences. It handles only ids.

Blocks with a name (see `prefix`) can be shared. When the last sequence lets go of one it stays as it is, for the next
sequence with the same beginning, until its place is needed: such a block is idle, and counts as free.

Contiguous runs of blocks are preferred: attention reads a run without gathering, and a transfer moves it as one
span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, combinations
from operator import eq

from pdctl.engine.cache.idle import Idle

# How many idle blocks may be given up, as a multiple of those needed, to find a contiguous run.
_MOST_EVICTED = 4


class BlockAllocator:
    """Manages ids 0 to num_blocks - 1. Every block is free, idle, shared by one or more owners, or quarantined.

    `num_free` counts free and idle blocks. `on_free` is called with blocks that have just been freed (used by the debug
    option that poisons them), `on_drop` with a name that leads to no block any more. `quota`: see Idle.
    """

    def __init__(
        self,
        num_blocks: int,
        on_free: Callable[[list[int]], None] | None = None,
        on_drop: Callable[[bytes], None] | None = None,
        quota: int = 0,
    ) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._free = bytearray(b"\1") * num_blocks
        self._owners = [0] * num_blocks
        self._owned: dict[str, list[int]] = {}
        self._quarantine: dict[str, list[int]] = {}
        self._idle: Idle[int] = Idle(quota)
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._tenant_of: dict[int, str] = {}
        # How often each block has lost its name: its content is what it was as long as this is.
        self._lives = [0] * num_blocks
        # Called with blocks that are idle from now on, beginnings of chains first.
        self.on_idle: Callable[[list[int]], None] | None = None
        self._on_free = on_free
        self._on_drop = on_drop
        self._cursor = 0

    @property
    def num_quarantined(self) -> int:
        """Blocks that a late transfer may still write to."""
        return sum(map(len, self._quarantine.values()))

    @property
    def num_idle(self) -> int:
        """Blocks that nobody uses, kept for their content."""
        return len(self._idle)

    def owned(self, owner: str) -> list[int]:
        """The owner's blocks in token order; empty for an unknown owner."""
        return self._owned.get(owner, [])

    def allocate(self, owner: str, count: int) -> list[int] | None:
        """Allocate `count` more blocks for `owner`; None (and no change) if there are too few."""
        if count > self.num_free:
            return None
        mine = self._owned.setdefault(owner, [])
        taken = self._neighbours(mine, count) or self._run(count) or self._evicted(count) or self._scattered(count)
        for block in taken:
            self._free[block] = 0
            self._owners[block] = 1
        self.num_free -= count
        mine.extend(taken)
        return taken

    def free(self, owner: str) -> int:
        """Take all blocks from `owner` and return their number; 0 for an unknown owner."""
        blocks = self._owned.pop(owner, [])
        self._let_go(blocks)
        return len(blocks)

    def shrink(self, owner: str, count: int) -> None:
        """Take all blocks but the first `count` from `owner`. They must have no name and no other owner."""
        blocks = self._owned[owner][count:]
        assert all(self._owners[block] == 1 and block not in self._name_of for block in blocks)
        del self._owned[owner][count:]
        self._let_go(blocks)

    # -- names ---------------------------------------------------------------------------------------------

    def name(self, block: int, name: bytes, tenant: str = "") -> bool:
        """Give an owned block of `tenant` a name: it can be found, and its content will not change. False if a block
        with this name exists: a second one stays nameless."""
        assert self._owners[block], "an unowned block has no content to name"
        if name in self._block_of or block in self._name_of:
            return False
        self._block_of[name] = block
        self._name_of[block] = name
        self._tenant_of[block] = tenant
        return True

    def named(self, block: int) -> tuple[bytes, str]:
        """The name and the tenant of a named block."""
        return self._name_of[block], self._tenant_of[block]

    def life(self, block: int) -> int:
        """A number that changes before a named block's content does. Any thread may ask."""
        return self._lives[block]

    def names(self) -> set[bytes]:
        """The names by which a block can be found."""
        return set(self._block_of)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks with these names, up to the first that does not exist."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, owner: str, blocks: list[int]) -> None:
        """Make `owner` an owner of these named blocks, after those that it has."""
        for block in blocks:
            assert block in self._name_of
            if not self._owners[block]:
                self._idle.remove(block)
                self.num_free -= 1
            self._owners[block] += 1
        self._owned.setdefault(owner, []).extend(blocks)

    # -- quarantine ----------------------------------------------------------------------------------------

    def quarantine(self, owner: str) -> None:
        """Quarantine the blocks of `owner` until `settle`, except for named ones: nothing writes to these."""
        assert owner not in self._quarantine
        blocks = self._owned.pop(owner, [])
        self._let_go([block for block in blocks if block in self._name_of])
        held = [block for block in blocks if block not in self._name_of]
        for block in held:
            self._owners[block] = 0
        self._quarantine[owner] = held

    def settle(self, owner: str) -> int:
        """Free the quarantined blocks of `owner`: nothing can write to them any more. Returns their number."""
        return self._reclaim(self._quarantine.pop(owner, []))

    def audit(self) -> None:
        """Check that each block is exactly once free, idle, owned or quarantined, and that names and owners fit.

        The core calls it whenever it has nothing to do, and the next request waits for its end: no Python per block.
        """
        owners = Counter(chain.from_iterable(self._owned.values()))
        assert owners.total() == sum(self._owners), "the number of owners is off"
        assert all(self._owners[block] == count for block, count in owners.items()), "a block has other owners"
        assert all(len(set(blocks)) == len(blocks) for blocks in self._owned.values()), "an owner has a block twice"
        held = list(chain.from_iterable(self._quarantine.values()))
        places = (owners.keys(), self._idle.keys(), set(held))
        assert len(places[2]) == len(held), "a block is quarantined twice"
        assert all(one.isdisjoint(other) for one, other in combinations(places, 2)), "a block is in two places"
        assert not any(map(self._free.__getitem__, chain(*places))), "a block is free and in use"
        free = self._free.count(1)
        assert sum(map(len, places)) + free == self.num_blocks, "a block is lost"
        assert self.num_free == free + len(self._idle), "the free count is off"
        assert len(self._name_of) == len(self._block_of), "names and blocks differ"
        named = map(self._block_of.get, self._name_of.values())
        assert all(map(eq, named, self._name_of)), "a name leads to another block"
        assert self._idle.keys() <= self._name_of.keys(), "a nameless block is kept"
        assert self._tenant_of.keys() == self._name_of.keys(), "a name without its tenant"
        self._idle.audit()

    # -- parts ---------------------------------------------------------------------------------------------

    def _let_go(self, blocks: list[int]) -> None:
        """One owner less for each. The last ones become idle first, so that ends of chains are given up before their
        beginnings."""
        nameless, idle = [], []
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, f"block {block} freed twice"
            if self._owners[block]:
                continue
            if block in self._name_of:
                self._idle.put(block, self._tenant_of[block])
                self.num_free += 1
                idle.append(block)
            else:
                nameless.append(block)
        self._reclaim(nameless[::-1])
        if idle and self.on_idle is not None:
            self.on_idle(idle[::-1])

    def _reclaim(self, blocks: list[int]) -> int:
        for block in blocks:
            assert not self._free[block], f"block {block} freed twice"
            self._free[block] = 1
        self.num_free += len(blocks)
        if blocks and self._on_free is not None:
            self._on_free(blocks)
        return len(blocks)

    def _evict(self, count: int) -> int:
        """Give up to `count` idle blocks free, in the order of Idle; their number."""
        given: list[int] = []
        while self._idle and len(given) < count:
            block = self._idle.pop()
            self._lives[block] += 1
            name = self._name_of.pop(block)
            del self._block_of[name], self._tenant_of[block]
            given.append(block)
            if self._on_drop is not None:
                self._on_drop(name)
        self.num_free -= len(given)
        return self._reclaim(given)

    def _evicted(self, count: int) -> list[int]:
        """A run of blocks after idle ones are given up; empty if there is none for a few times as many."""
        for _ in range(_MOST_EVICTED):
            if not self._evict(count):
                break
            if found := self._run(count):
                return found
        return []

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
        self._evict(count - (self.num_free - len(self._idle)))
        taken: list[int] = []
        start = 0
        while len(taken) < count:
            start = self._free.index(1, start)
            taken.append(start)
            start += 1
        return taken
