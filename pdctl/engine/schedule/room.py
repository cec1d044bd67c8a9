"""Blocks and seats of the sequences of one engine, with counts that are kept instead of computed."""

from __future__ import annotations

from collections.abc import Iterable

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.sequence import Sequence, Status

# Part of the pool that admission leaves free, so that the running sequences can grow without preempting one.
_WATERMARK = 0.01


class Room:
    """`pinned`: blocks of sequences whose KV is for a peer; `leased`: those of them that are ready; `reserved`: blocks
    for KV that is being pulled; `expected`: sequences with such blocks, each of which has a seat."""

    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        self.limits = limits
        self.allocator = allocator
        self.pinned = self.leased = self.reserved = self.expected = 0
        self._spare = int(allocator.num_blocks * _WATERMARK)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold so many tokens."""
        return -(-num_tokens // self.limits.block_size)

    def grow(self, sequence: Sequence, num_tokens: int, keep_spare: bool = False) -> bool:
        """Give the sequence the blocks for its first `num_tokens` tokens; False if there are too few."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        if keep_spare and self.allocator.num_free - missing < self._spare:
            return False
        taken = self.allocator.allocate(sequence.request_id, missing)
        if taken is None:
            return False
        sequence.block_ids.extend(taken)
        self._count(sequence, missing)
        return True

    def release(self, sequence: Sequence) -> None:
        """Free all blocks of the sequence."""
        self._count(sequence, -len(sequence.block_ids))
        self.allocator.free(sequence.request_id)
        sequence.block_ids.clear()

    def quarantine(self, sequence: Sequence) -> None:
        """Take the blocks from the sequence, but do not use them again before `allocator.settle`."""
        self._count(sequence, -len(sequence.block_ids))
        self.allocator.quarantine(sequence.request_id)
        sequence.block_ids.clear()

    def become(self, sequence: Sequence, status: Status) -> None:
        """Change the status of the sequence, with its counts."""
        self._count(sequence, -len(sequence.block_ids))
        self.expected += (status is Status.AWAITING_KV) - (sequence.status is Status.AWAITING_KV)
        sequence.status = status
        self._count(sequence, len(sequence.block_ids))

    def allows_lease(self, sequence: Sequence) -> bool:
        """Whether a prefill for a peer keeps to the limit of leased blocks. A single one is always allowed."""
        wanted = self.blocks_for(len(sequence.token_ids))
        return not self.pinned or self.pinned + wanted <= self.limits.max_leased_blocks

    def audit(self, sequences: Iterable[Sequence]) -> None:
        """Check the counts against the sequences."""
        found = list(sequences)
        by_status = {status: sum(len(s.block_ids) for s in found if s.status is status) for status in Status}
        assert self.pinned == sum(len(s.block_ids) for s in found if s.hold), "pinned"
        assert self.leased == by_status[Status.HELD], "leased"
        assert self.reserved == by_status[Status.AWAITING_KV], "reserved"
        assert self.expected == sum(s.status is Status.AWAITING_KV for s in found), "expected"
        owned = sum(by_status.values())
        idle = self.allocator.num_free + self.allocator.num_quarantined
        assert owned + idle == self.allocator.num_blocks, "blocks without a sequence"
        self.allocator.audit()

    def _count(self, sequence: Sequence, blocks: int) -> None:
        if sequence.hold:
            self.pinned += blocks
        if sequence.status is Status.HELD:
            self.leased += blocks
        elif sequence.status is Status.AWAITING_KV:
            self.reserved += blocks
