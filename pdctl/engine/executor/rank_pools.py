"""The KV pools of all ranks: in host memory that they share with the core, or each on its rank's own GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pdctl.engine.cache.kv_pool import KvPool, is_apart
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.executor.exported import mapped
from pdctl.engine.executor.gpu_memory import blocks_in, blocks_of_largest_step, number_of_blocks, room_for_kv
from pdctl.engine.executor.others import OtherRanks
from pdctl.engine.executor.pipe import Measure, Pools, Room, Started, device_of
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.wire import Manifest

# Time for a rank to allocate its pool, or to compute the largest step.
_START_S = 300.0


class AllRanks(NamedTuple):
    """What the pools depend on. `manifests`: what each rank has of the KV; `free`: bytes of each one's device."""

    options: EngineOptions
    others: OtherRanks
    manifests: list[Manifest]
    free: list[int]

    @property
    def device(self) -> torch.device:
        """The first rank's."""
        return device_of(self.options.device, 0)


def open_pools(ranks: AllRanks, runner_over: Callable[[int], ModelRunner]) -> list[KvPool]:
    """The pools of all ranks, in their order. `runner_over`: the first rank's over a pool of so many blocks, to measure
    the largest step. Raises ModelRefused, NoMemory, RankLost, torch.OutOfMemoryError."""
    if is_apart(ranks.device):
        return _on_gpus(ranks, runner_over)
    sizes = [block_bytes(manifest) for manifest in ranks.manifests]
    num_blocks = number_of_blocks(ranks.options, [sum(sizes)], ranks.free[:1])
    memories = [Memory(num_blocks * size, ranks.options.epoch, populated=rank == 0) for rank, size in enumerate(sizes)]
    message = Pools(num_blocks, is_apart=False)
    ranks.others.tell_each([message] * len(memories[1:]), [memory.fd for memory in memories[1:]])
    ranks.others.expect(Started, _START_S)
    return [
        KvPool(manifest, num_blocks, memory, ranks.device)
        for manifest, memory in zip(ranks.manifests, memories, strict=True)
    ]


def _on_gpus(ranks: AllRanks, runner_over: Callable[[int], ModelRunner]) -> list[KvPool]:
    if ranks.options.gpu_memory_utilization:
        num_blocks = _measured(ranks, runner_over)
    else:
        num_blocks = number_of_blocks(ranks.options, [block_bytes(one) for one in ranks.manifests], ranks.free)
    ranks.others.tell(Pools(num_blocks, is_apart=True))
    ours = KvPool(ranks.manifests[0], num_blocks, None, ranks.device)
    places = [one.place for one in ranks.others.expect(Started, _START_S)]
    devices = [device_of(ranks.options.device, rank) for rank in range(1, len(ranks.manifests))]
    return [ours, *mapped(ranks.manifests[1:], num_blocks, places, devices)]


def _measured(ranks: AllRanks, runner_over: Callable[[int], ModelRunner]) -> int:
    """The number of blocks that all have room for, after a step of the largest size on each."""
    blocks = blocks_of_largest_step(ranks.options)
    ranks.others.tell(Measure(blocks))
    ours = room_for_kv(ranks.options, ranks.device, runner_over)
    rooms = [ours, *(one.num_bytes for one in ranks.others.expect(Room, _START_S))]
    return min(blocks_in(room, manifest) for room, manifest in zip(rooms, ranks.manifests, strict=True))
