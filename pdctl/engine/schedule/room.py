"""Blocks and seats of the sequences of one engine, with counts that are kept instead of computed."""

from __future__ import annotations

from collections.abc import Iterable

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.peers.kv_journal import KvJournal
from pdctl.engine.schedule.sequence import Sequence, Status

# Part of the pool that admission leaves free, so that the running sequences can grow without preempting one.
_WATERMARK = 0.01


class _Blocks:
    """Counts blocks that are used by sequences of one sort; a block used by several of them counts once."""

    def __init__(self, num_blocks: int) -> None:
        self.count = 0
        self._users = [0] * num_blocks

    def change(self, blocks: Iterable[int], by: int) -> None:
        """One user more (1) or less (-1) for each block."""
        for block in blocks:
            before = self._users[block]
            self._users[block] = before + by
            self.count += (before + by > 0) - (before > 0)


class Room:
    """`pinned`: blocks of sequences whose KV is for a peer; `leased`: those of them that are ready; `reserved`: blocks
    for KV that is being pulled; `expected`: sequences with such blocks, each of which has a seat. `looked_up` and
    `found`: tokens of prompts, and those of them whose KV was there. `root`: see `prefix`; None: nothing is shared.
    `journal`: gets the blocks that can be found; what the allocator drops reaches it by `on_drop`."""

    def __init__(
        self,
        limits: Limits,
        allocator: BlockAllocator,
        root: bytes | None = None,
        journal: KvJournal | None = None,
    ) -> None:
        self.limits = limits
        self.allocator = allocator
        self.expected = 0
        self.looked_up = self.found = 0
        self._pinned, self._leased, self._reserved = (_Blocks(allocator.num_blocks) for _ in range(3))
        self._spare = int(allocator.num_blocks * _WATERMARK)
        self._root = root
        self._journal = journal

    @property
    def leased(self) -> int:
        """Blocks whose KV waits for a peer."""
        return self._leased.count

    @property
    def reserved(self) -> int:
        """Blocks of sequences whose KV is being pulled."""
        return self._reserved.count

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold so many tokens."""
        return -(-num_tokens // self.limits.block_size)

    def has(self, num_tokens: int) -> bool:
        """Whether there are blocks for so many tokens, and those that admission leaves free."""
        return self.blocks_for(num_tokens) + self._spare <= self.allocator.num_free

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
        self._count(sequence, taken, 1)
        return True

    def grow_all(self, wanted: list[tuple[Sequence, int]]) -> bool:
        """Give each sequence the blocks for its first so many tokens; False, and no blocks for any, if there are too
        few."""
        missing = (self.blocks_for(num_tokens) - len(sequence.block_ids) for sequence, num_tokens in wanted)
        if sum(max(0, count) for count in missing) > self.allocator.num_free:
            return False
        for sequence, num_tokens in wanted:
            assert self.grow(sequence, num_tokens)
        return True

    def attach(self, sequence: Sequence, longest: int) -> int:
        """Give a sequence without blocks those that hold the KV of its first tokens, at most of `longest` of them.
        Returns the number of these tokens."""
        assert not sequence.block_ids
        # The log probabilities of a prompt need every token's logits.
        if self._root is None or sequence.sampling.prompt_logprobs >= 0:
            return 0
        names = self._names(sequence, longest // self.limits.block_size)
        blocks = self._whole(self.allocator.find(names))
        self.allocator.share(sequence.request_id, blocks)
        sequence.block_ids.extend(blocks)
        sequence.num_named = len(blocks)
        self._count(sequence, blocks, 1)
        sequence.num_whole = len(blocks) * self.limits.block_size
        return sequence.num_whole

    def looked_for(self, sequence: Sequence, found: int) -> None:
        """Count what a prompt found when it was admitted for the first time."""
        if self._root is not None and not sequence.preemptions:
            self.looked_up += sequence.prompt_len
            self.found += found
            sequence.num_cached = found

    def computed(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens of the sequence are computed."""
        if sequence.num_computed == sequence.num_whole and count == self.limits.segment:
            sequence.num_whole += count
        sequence.num_computed += count
        self._name(sequence)

    def pulled(self, sequence: Sequence) -> None:
        """The KV of a sequence has come from a peer."""
        sequence.num_computed = sequence.kv_tokens
        size = self.limits.segment
        if size and sequence.kv_segment == size:
            sequence.num_whole = sequence.kv_tokens // size * size
        self._name(sequence)

    def _name(self, sequence: Sequence) -> None:
        """Name the full blocks whose KV is computed, so that others with the same beginning find them."""
        end = sequence.num_whole if self.limits.segment else sequence.num_computed
        full = end // self.limits.block_size
        if self._root is None or full <= sequence.num_named:
            return
        names, size, tenant = self._names(sequence, full), self.limits.block_size, prefix.tenant_of(sequence.salt)
        for index in range(sequence.num_named, full):
            is_new = self.allocator.name(sequence.block_ids[index], names[index], tenant)
            if is_new and self._journal is not None:
                tokens = sequence.token_ids[index * size : (index + 1) * size]
                self._journal.stored(names[index], names[index - 1] if index else None, tokens)
        sequence.num_named = full

    def trim(self, sequence: Sequence) -> None:
        """Free the blocks behind those of the computed tokens."""
        kept = self.blocks_for(sequence.num_computed)
        if kept < len(sequence.block_ids):
            self._count(sequence, sequence.block_ids[kept:], -1)
            self.allocator.shrink(sequence.request_id, kept)
            del sequence.block_ids[kept:]

    def release(self, sequence: Sequence) -> None:
        """Free all blocks of the sequence."""
        self._count(sequence, sequence.block_ids, -1)
        self.allocator.free(sequence.request_id)
        sequence.block_ids.clear()
        sequence.num_named = sequence.num_whole = 0

    def quarantine(self, sequence: Sequence) -> None:
        """Take the blocks from the sequence, but do not use them again before `allocator.settle`."""
        self._count(sequence, sequence.block_ids, -1)
        self.allocator.quarantine(sequence.request_id)
        sequence.block_ids.clear()

    def become(self, sequence: Sequence, status: Status) -> None:
        """Change the status of the sequence, with its counts."""
        self._count(sequence, sequence.block_ids, -1)
        self.expected += (status is Status.AWAITING_KV) - (sequence.status is Status.AWAITING_KV)
        sequence.status = status
        self._count(sequence, sequence.block_ids, 1)

    def pin(self, sequence: Sequence) -> None:
        """From now on the KV of this sequence is for a peer."""
        self._count(sequence, sequence.block_ids, -1)
        sequence.hold = True
        self._count(sequence, sequence.block_ids, 1)

    def allows_lease(self, sequence: Sequence) -> bool:
        """Whether a prefill for a peer keeps to the limit of leased blocks. A single one is always allowed."""
        wanted = self.blocks_for(len(sequence.token_ids))
        return not self._pinned.count or self._pinned.count + wanted <= self.limits.max_leased_blocks

    def audit(self, sequences: Iterable[Sequence]) -> None:
        """Check the counts against the sequences."""
        found = list(sequences)
        assert self._pinned.count == _distinct(s for s in found if s.hold), "pinned"
        assert self.leased == _distinct(s for s in found if s.status is Status.HELD), "leased"
        assert self.reserved == _distinct(s for s in found if s.status is Status.AWAITING_KV), "reserved"
        assert self.expected == sum(s.status is Status.AWAITING_KV for s in found), "expected"
        idle = self.allocator.num_free + self.allocator.num_quarantined
        assert _distinct(found) + idle == self.allocator.num_blocks, "blocks without a sequence"
        for sequence in found:
            assert sequence.block_ids == self.allocator.owned(sequence.request_id), sequence.request_id
            if self._root is not None:
                assert sequence.num_named <= sequence.num_computed // self.limits.block_size or sequence.kv_tokens
        self.allocator.audit()

    def _names(self, sequence: Sequence, count: int) -> list[bytes]:
        """The names of the first `count` blocks of a sequence. They are computed once."""
        assert self._root is not None
        names, size = sequence.block_names, self.limits.block_size
        for index in range(len(names), count):
            before = names[-1] if names else prefix.salted(self._root, sequence.salt)
            names.append(prefix.following(before, sequence.token_ids[index * size : (index + 1) * size]))
        return names[:count]

    def _whole(self, blocks: list[int]) -> list[int]:
        """Those that make whole segments."""
        per_segment = max(1, self.limits.segment // self.limits.block_size)
        return blocks[: len(blocks) // per_segment * per_segment]

    def _count(self, sequence: Sequence, blocks: list[int], by: int) -> None:
        if sequence.hold:
            self._pinned.change(blocks, by)
        if sequence.status is Status.HELD:
            self._leased.change(blocks, by)
        elif sequence.status is Status.AWAITING_KV:
            self._reserved.change(blocks, by)


def _distinct(sequences: Iterable[Sequence]) -> int:
    return len({block for sequence in sequences for block in sequence.block_ids})
