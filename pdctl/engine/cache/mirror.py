"""A copy of a GPU's KV pool in host memory, for transports that read host memory. It is written for peers, and never
read here.

Blocks are copied in batches: those of all layers are gathered on the device, cross the bus as one piece through pinned
memory, and are spread on the host, while the next piece is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from pdctl.engine.cache.memory import Memory

_STAGING_BYTES = 32 << 20
_NUM_STAGINGS = 2


class _Planes(NamedTuple):
    """Adjacent planes with blocks of one size, on both sides: [planes, blocks, bytes of a block]."""

    device: torch.Tensor
    host: torch.Tensor

    @property
    def bytes_per_block(self) -> int:
        """Of all these planes."""
        return int(self.device.shape[0] * self.device.shape[2])


class _Staging:
    """Pinned memory for one piece on its way. `busy` is set while the device may use it."""

    def __init__(self, num_bytes: int, on_gpu: bool) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.busy: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the device is done with it."""
        if self.busy is not None:
            self.busy.synchronize()


class Mirror:
    """`store`: the pool's bytes on the device. `memory`: as many on the host. `planes`: (offset, bytes per block) of
    each plane of `num_blocks`."""

    def __init__(self, store: torch.Tensor, memory: Memory, planes: list[tuple[int, int]], num_blocks: int) -> None:
        # The memory must outlive the tensors over it.
        self.memory = memory
        host = torch.frombuffer(memory.view, dtype=torch.uint8, count=len(store))
        self._store = store
        self._planes = [
            _Planes(_cut(store, offset, count, num_blocks, size), _cut(host, offset, count, num_blocks, size))
            for offset, count, size in _runs(planes)
        ]
        largest = max(planes.bytes_per_block for planes in self._planes)
        on_gpu = store.device.type == "cuda"
        self._stagings = [_Staging(max(_STAGING_BYTES, largest), on_gpu) for _ in range(_NUM_STAGINGS)]

    def publish(self, block_ids: Sequence[int]) -> None:
        """Copy these blocks from the device to the host."""
        under_way: list[tuple[_Staging, torch.Tensor, _Planes, torch.Tensor]] = []
        for number, (planes, ids) in enumerate(self._pieces(block_ids)):
            staging = self._stagings[number % _NUM_STAGINGS]
            if len(under_way) == _NUM_STAGINGS:
                _spread(*under_way.pop(0))
            part = planes.device.index_select(1, ids.to(self._store.device))
            piece = staging.memory[: part.numel()].view(part.shape)
            piece.copy_(part, non_blocking=True)
            staging.busy = _event(self._store)
            under_way.append((staging, piece, planes, ids))
        for one in under_way:
            _spread(*one)

    def _pieces(self, block_ids: Sequence[int]) -> Iterator[tuple[_Planes, torch.Tensor]]:
        for planes in self._planes:
            most = len(self._stagings[0].memory) // planes.bytes_per_block
            for at in range(0, len(block_ids), most):
                yield planes, torch.tensor(block_ids[at : at + most])


def _spread(staging: _Staging, piece: torch.Tensor, planes: _Planes, ids: torch.Tensor) -> None:
    staging.wait()
    planes.host.index_copy_(1, ids, piece)


def _event(store: torch.Tensor) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(store.device).record_event() if store.device.type == "cuda" else None


def _runs(planes: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(offset, number of planes, bytes per block) of adjacent planes with blocks of one size."""
    for size, run in groupby(planes, key=lambda plane: plane[1]):
        offsets = [offset for offset, _ in run]
        yield offsets[0], len(offsets), size


def _cut(raw: torch.Tensor, offset: int, count: int, num_blocks: int, size: int) -> torch.Tensor:
    return raw[offset : offset + count * num_blocks * size].view(count, num_blocks, size)
