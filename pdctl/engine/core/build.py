"""Builds a core from its options: executor, transports, scheduler, puller."""

from __future__ import annotations

import os
import time
from functools import partial

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.latency_file import LatencyFile
from pdctl.engine.core.loop import Core, CoreEvent, Settled, report
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.core.transports import open_transports
from pdctl.engine.core.warm_up import measured
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.handover.puller import PoolShape, Puller
from pdctl.engine.ipc.messages import Ready
from pdctl.engine.model.loading import LoadedModel, ModelRefused
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.kv_journal import KvJournal
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.host.boot import host_id
from pdctl.host.users import cache_root
from pdctl.speculative import parse_speculative
from pdctl.wire import SECRET_ENV, PoolEndpoint, Served


def build(options: EngineOptions, outbox: Outbox) -> tuple[Core, Ready]:
    """Build everything that may fail. Raises ModelRefused, NoMemory, TransferError, torch.OutOfMemoryError."""
    executor = SingleExecutor.load(options)
    transports = open_transports(options, executor.pool)
    manifest, num_blocks = executor.manifest, executor.num_blocks
    limits = _limits(options, executor.loaded, num_blocks)
    inbox: Inbox[CoreEvent] = Inbox()
    ours = PoolShape(manifest, executor.pool_blocks, host_id(), options.transfer, options.read_s)
    puller = Puller(ours, transports, partial(report, inbox, outbox), lambda name: inbox.put(Settled(name)))
    journal = KvJournal(options.kv_events == "tokens") if options.kv_events != "off" else None
    allocator = BlockAllocator(num_blocks, executor.poison, journal.removed if journal else None)
    names = prefix.root(manifest, os.environ.get(SECRET_ENV, "")) if options.prefix_caching else None
    kept = LatencyFile(cache_root() / "latency", executor.latency_key)
    latency = kept.load(partial(_measured, executor, limits, num_blocks))
    guesses = parse_speculative(options.speculative)
    scheduler = Scheduler(limits, allocator, latency, time.monotonic, names, journal, guesses)
    ahead = options.schedules_ahead
    core = Core(scheduler, executor, executor.grammars, puller, inbox, outbox, kept.save, ahead)
    served = [Served(t.name, t.address, t.protocol, t.fallback) for t in transports.values() if t.address]
    ready = Ready(
        endpoint=PoolEndpoint(ours.host_id, served, executor.pool_blocks, manifest),
        num_blocks=num_blocks,
        block_size=options.block_size,
        block_bytes=block_bytes(manifest),
        max_model_len=limits.max_model_len,
        vocab_size=executor.loaded.vocab_size,
        attention=executor.attention,
        graphs=executor.graphs,
    )
    return core, ready


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
