"""Opens the tiers of an engine over its KV pool."""

from __future__ import annotations

import os

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.options import EngineOptions
from pdctl.engine.tiers import Tier, TierRefused, store_kind
from pdctl.engine.tiers.blocks import WholeBlocks
from pdctl.engine.tiers.host import HostTier, capacity_of
from pdctl.engine.tiers.tiers import Tiers
from pdctl.host.memory import read_memory
from pdctl.wire import SECRET_ENV


def open_tiers(options: EngineOptions, executor: SingleExecutor, allocator: BlockAllocator) -> Tiers | None:
    """The tiers that are configured, which follow the allocator; None: there are none. Raises TierRefused."""
    if not options.has_tiers:
        return None
    blocks = WholeBlocks(executor.manifest, executor.shards, executor.pools)
    tiers: list[Tier] = []
    if options.kv_offload_gb:
        tiers.append(_host(options, blocks.block_bytes))
    if options.store:
        # A name says nothing of how the block was computed; see Manifest.segment.
        segment = prefix.segment(options.block_size) if options.deterministic else 0
        secret = os.environ.get(SECRET_ENV, "")
        tiers.append(store_kind(options.store).open_store(f"pdctl-{segment}-", secret, blocks.block_bytes))
    return Tiers(tiers, blocks, allocator)


def quota_of(part: float, num_blocks: int) -> int:
    """The number of blocks that this part of all is; 0: no quota. See Idle."""
    return max(1, int(part * num_blocks)) if part < 1 else 0


def _host(options: EngineOptions, block_bytes: int) -> HostTier:
    capacity = capacity_of(options.kv_offload_gb, block_bytes)
    if not capacity:
        raise TierRefused(f"kv_offload_gb = {options.kv_offload_gb:g} does not hold one block of {block_bytes} bytes")
    _, available = read_memory()
    if capacity * block_bytes > available:
        raise TierRefused(
            f"kv_offload_gb = {options.kv_offload_gb:g} does not fit: {available / 2**30:.1f} GiB of memory are free"
        )
    quota = quota_of(options.prefix_quota, capacity)
    return HostTier(capacity, block_bytes, quota, pinned=options.device == "cuda")
