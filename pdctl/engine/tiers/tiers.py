"""All tiers of one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Load, Look, Pulled, Seen, TierBooks
from pdctl.engine.tiers import Tier
from pdctl.engine.tiers.blocks import WholeBlocks
from pdctl.engine.tiers.loading import Loader, Pulls
from pdctl.engine.tiers.offload import IdleBlock, Offload


class Tiers:
    """`tiers`: the fastest first. They get what becomes idle in `allocator`. Nothing here waits for one of them."""

    def __init__(self, tiers: Sequence[Tier], blocks: WholeBlocks, allocator: BlockAllocator) -> None:
        self._tiers = tiers
        self._blocks = blocks
        self._allocator = allocator
        self._offloads = [Offload(tier, blocks.read, allocator.life) for tier in tiers]
        self._loader: Loader | None = None
        allocator.on_idle = self._idle

    def begin(
        self,
        pulls: Pulls,
        loaded: Callable[[Pulled], None],
        answer: Callable[[Seen | Pulled], None],
    ) -> None:
        """Answer questions from now on: see Loader."""
        self._loader = Loader(self._tiers, self._blocks, pulls, loaded, answer)

    def submit(self, work: Look | Load) -> None:
        """Answer what is there, or load it. Never blocks."""
        assert self._loader is not None
        self._loader.submit(work)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Names of blocks that came to, and went from, this engine's own tiers since the last call."""
        found = [tier.changes() for tier in self._tiers]
        return [name for came, _ in found for name in came], [name for _, went in found for name in went]

    def books(self) -> list[TierBooks]:
        """The counts of each, for display."""
        return [
            TierBooks(
                tier.name, tier.is_there, tier.num_blocks, tier.counts.stored, tier.counts.refused,
                tier.counts.loaded, tier.counts.wrong, offload.dropped,
            )
            for tier, offload in zip(self._tiers, self._offloads, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        """The engine ends."""
        for offload in self._offloads:
            offload.close()
        if self._loader is not None:
            self._loader.close()
        for tier in self._tiers:
            tier.close()

    def _idle(self, block_ids: Sequence[int]) -> None:
        """These blocks are not used any more: copy them, before they are given up."""
        named, life = self._allocator.named, self._allocator.life
        blocks = [IdleBlock(block, *named(block), life(block)) for block in block_ids]
        for offload in self._offloads:
            offload.put(blocks)
