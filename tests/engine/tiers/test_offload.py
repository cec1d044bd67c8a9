"""What is copied to a tier, and what is not: a block that is given up meanwhile must never be kept under its name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.tiers import Rows, Tier, TierCounts, TierFailed
from pdctl.engine.tiers import offload as module
from pdctl.engine.tiers.host import HostTier
from pdctl.engine.tiers.offload import IdleBlock, Offload

SIZE = 4


class Pool:
    """Blocks with content, and an allocator. `meanwhile`: done while blocks are copied."""

    def __init__(self, blocks: int = 8) -> None:
        self.rows = np.zeros((blocks, SIZE), np.uint8)
        self.allocator = BlockAllocator(blocks)
        self.meanwhile: Callable[[], None] = lambda: None

    def read(self, block_ids: Sequence[int]) -> Rows:
        self.meanwhile()
        found: Rows = self.rows[list(block_ids)]
        return found

    def filled(self, owner: str, *contents: int) -> list[IdleBlock]:
        """Blocks that somebody has computed and let go of."""
        blocks = self.allocator.allocate(owner, len(contents))
        assert blocks is not None
        for block, content in zip(blocks, contents, strict=True):
            self.rows[block] = content
            self.allocator.name(block, bytes([content]), "t")
        self.allocator.free(owner)
        return [IdleBlock(block, *self.allocator.named(block), self.allocator.life(block)) for block in blocks]

    def overwrite(self, content: int) -> None:
        """All blocks go to somebody else."""
        blocks = self.allocator.allocate("other", self.allocator.num_free)
        assert blocks is not None
        self.rows[blocks] = content


def offload(tier: Tier, pool: Pool) -> Offload:
    return Offload(tier, pool.read, pool.allocator.life)


def test_idle_blocks_are_copied() -> None:
    pool, tier = Pool(), HostTier(8, SIZE)
    copies = offload(tier, pool)
    copies.put(pool.filled("a", 1, 2, 3))
    assert copies.wait_until_done(60)
    assert (tier.get([bytes([n]) for n in (1, 2, 3)])[:, 0] == [1, 2, 3]).all()
    copies.put(pool.filled("b", 4))
    assert copies.wait_until_done(60)
    assert (tier.counts.stored, copies.dropped) == (4, 0)
    copies.close()


def test_a_block_that_is_given_up_while_it_is_copied_is_not_kept() -> None:
    pool, tier = Pool(), HostTier(8, SIZE)
    copies = offload(tier, pool)
    pool.meanwhile = lambda: pool.overwrite(99)
    copies.put(pool.filled("a", 1, 2))
    assert copies.wait_until_done(60)
    assert tier.missing([b"\1", b"\2"]) == [True, True]
    assert copies.dropped == 2
    copies.close()


def test_a_block_that_was_given_up_and_named_again_is_kept_for_what_it_is() -> None:
    pool, tier = Pool(2), HostTier(8, SIZE)
    old = pool.filled("a", 1, 2)
    new = pool.filled("b", 3, 4)
    assert [one.block for one in old] == [one.block for one in new]
    copies = offload(tier, pool)
    copies.put([*old, *new])
    assert copies.wait_until_done(60)
    assert tier.missing([bytes([n]) for n in (1, 2, 3, 4)]) == [True, True, False, False]
    copies.close()


class Slow(HostTier):
    """A tier that takes its time, and may fail or be away."""

    def __init__(self) -> None:
        super().__init__(64, SIZE)
        self.may_go_on = threading.Event()
        self.fails = self.is_away = False
        self.counts = TierCounts()

    @property
    def is_there(self) -> bool:  # type: ignore[override]
        return not self.is_away

    def missing(self, names: Sequence[bytes]) -> list[bool]:
        assert self.may_go_on.wait(60)
        if self.fails:
            raise TierFailed("no")
        return super().missing(names)


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tier = Pool(64), Slow()
    copies = offload(tier, pool)
    copies.put(pool.filled("first", 1))
    monkeypatch.setattr(module, "_MOST_WAITING", 5)
    for content in range(10, 30):
        copies.put(pool.filled(str(content), content))
    tier.may_go_on.set()
    assert copies.wait_until_done(60)
    assert copies.dropped >= 14
    assert tier.missing([bytes([n]) for n in range(25, 30)]) == [False] * 5, "the newest ones were kept"
    copies.close()


def test_a_tier_that_fails_or_is_away_costs_the_blocks_only() -> None:
    pool, tier = Pool(), Slow()
    tier.may_go_on.set()
    copies = offload(tier, pool)
    tier.is_away = True
    copies.put(pool.filled("a", 1))
    assert copies.dropped == 1
    tier.is_away, tier.fails = False, True
    copies.put(pool.filled("b", 2))
    assert copies.wait_until_done(60)
    assert copies.dropped == 2
    tier.fails = False
    copies.put(pool.filled("c", 3))
    assert copies.wait_until_done(60)
    assert tier.missing([b"\3"]) == [False]
    copies.close()
