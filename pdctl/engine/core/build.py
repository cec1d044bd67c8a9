"""Builds a core from its options: executor, transports, scheduler, puller."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.shards import Shard
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.latency_file import LatencyFile
from pdctl.engine.core.loop import Core, CoreEvent, Settled, report
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.core.tiers import open_tiers, quota_of
from pdctl.engine.core.transports import open_staging, open_transports
from pdctl.engine.core.warm_up import measured
from pdctl.engine.executor.ranks import RanksExecutor
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.handover.puller import OurSide, Puller
from pdctl.engine.handover.reading import OurShard, ShardReader, whole_block_bytes
from pdctl.engine.ipc.messages import Ready
from pdctl.engine.model.loading import LoadedModel, ModelRefused
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.peers.kv_journal import KvJournal
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.host.boot import host_id
from pdctl.host.users import cache_root
from pdctl.speculative import parse_speculative
from pdctl.wire import SECRET_ENV, KvEndpoint, PoolEndpoint, Served


def build(options: EngineOptions, outbox: Outbox, lost: Callable[[str, bool], None]) -> tuple[Core, Ready]:
    """Build everything that may fail. `lost`: see RanksExecutor. Raises ModelRefused, NoMemory, TransferError,
    TierRefused, RankLost, torch.OutOfMemoryError."""
    executor = SingleExecutor.load(options) if options.num_ranks == 1 else RanksExecutor.load_ranks(options, lost)
    ours = [_shard(options, shard, pool) for shard, pool in zip(executor.shards, executor.pools, strict=True)]
    manifest, num_blocks = executor.manifest, executor.num_blocks
    limits = _limits(options, executor.loaded, num_blocks)
    inbox: Inbox[CoreEvent] = Inbox()
    side = OurSide(manifest, host_id(), options.transfer, options.read_s)
    reader = ShardReader(ours, partial(open_staging, options))
    puller = Puller(side, reader, partial(report, inbox, outbox), lambda name: inbox.put(Settled(name)))
    journal = KvJournal(options.kv_events == "tokens") if options.prefix_caching else None
    on_drop, quota = journal.removed if journal else None, quota_of(options.prefix_quota, num_blocks)
    allocator = BlockAllocator(num_blocks, executor.poison, on_drop, quota)
    tiers = open_tiers(options, executor, allocator)
    names = prefix.root(manifest, os.environ.get(SECRET_ENV, "")) if options.prefix_caching else None
    kept = LatencyFile(cache_root() / "latency", executor.latency_key)
    latency = kept.load(partial(_measured, executor, limits, num_blocks))
    guesses = parse_speculative(options.speculative)
    scheduler = Scheduler(limits, allocator, latency, time.monotonic, names, journal, guesses)
    ahead = options.schedules_ahead
    core = Core(scheduler, executor, executor.grammars, puller, inbox, outbox, kept.save, ahead, tiers)
    ready = Ready(
        endpoint=KvEndpoint(tuple(_served(side.host_id, one) for one in ours)),
        num_blocks=num_blocks,
        block_size=options.block_size,
        block_bytes=whole_block_bytes(manifest, executor.shards),
        max_model_len=limits.max_model_len,
        vocab_size=executor.loaded.vocab_size,
        attention=executor.attention,
        graphs=executor.graphs,
    )
    return core, ready


def _shard(options: EngineOptions, shard: Shard, pool: KvPool) -> OurShard:
    opened = open_transports(options, pool)
    direct = frozenset(name for name, one in opened.items() if one.is_direct)
    return OurShard(shard, pool, {name: one.transport for name, one in opened.items()}, direct)


def _served(host_id: str, ours: OurShard) -> PoolEndpoint:
    served = [Served(t.name, t.address, t.protocol, t.fallback) for t in ours.transports.values() if t.address]
    return PoolEndpoint(host_id, served, ours.shard.num_blocks, ours.shard.manifest, ours.shard.part)


def _measured(executor: SingleExecutor, limits: Limits, num_blocks: int) -> LatencyModel:
    model = measured(executor.execute, limits, num_blocks, executor.loaded.vocab_size)
    if executor.poison is not None:
        executor.poison(list(range(num_blocks)))
    return model


def _limits(options: EngineOptions, loaded: LoadedModel, num_blocks: int) -> Limits:
    if options.max_model_len > loaded.max_positions:
        raise ModelRefused(
            f"max_model_len = {options.max_model_len} is more than the {loaded.max_positions} positions of this model "
            "that can be served"
        )
    segment = prefix.segment(options.block_size) if options.deterministic else 0
    if segment and options.max_num_batched_tokens < segment + options.max_num_seqs:
        raise ModelRefused(
            f"deterministic needs max_num_batched_tokens of {segment + options.max_num_seqs} at least: a segment of "
            f"{segment} tokens beside {options.max_num_seqs} sequences"
        )
    return Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        eos_token_ids=loaded.eos_token_ids,
        max_leased_blocks=int(options.leased_max * num_blocks),
        policy=options.policy,
        keeps_tpot=options.inline_prefill,
        segment=segment,
    )
