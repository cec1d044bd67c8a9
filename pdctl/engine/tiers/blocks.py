"""Whole blocks of an engine as bytes: gathered from the pools of all its devices, and spread over them.

A block's bytes are the same whatever the engine's width, so an engine of another width can use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import ITEM_BYTES, block_bytes, plane_bytes, plane_offsets
from pdctl.engine.cache.shards import Shard, heads, layers
from pdctl.engine.tiers import Rows
from pdctl.wire import Manifest


class _Plane(NamedTuple):
    """A plane of a pool, and its place in a whole block: of each token's row of `row` bytes there, those from `first`.
    `is_first`: no pool before this one has the same."""

    pool: npt.NDArray[np.uint8]  # [blocks, tokens, bytes of a token]
    start: int
    row: int
    first: int
    is_first: bool

    def part(self, rows: Rows, block_size: int) -> npt.NDArray[np.uint8]:
        """Its place in these rows: a view, [blocks, tokens, bytes of a token]."""
        whole = rows[:, self.start : self.start + block_size * self.row].reshape(len(rows), block_size, self.row)
        return whole[:, :, self.first : self.first + self.pool.shape[2]]


class HostBlocks:
    """Of an engine whose pools are in host memory."""

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], pools: Sequence[KvPool]) -> None:
        self.block_bytes = block_bytes(manifest)
        self._size = manifest.block_size
        self._planes = list(_planes(manifest, shards, pools))

    def read(self, block_ids: Sequence[int]) -> Rows:
        """A copy of these blocks."""
        rows = np.empty((len(block_ids), self.block_bytes), np.uint8)
        for plane in self._planes:
            if plane.is_first:
                plane.part(rows, self._size)[:] = plane.pool[block_ids]
        return rows

    def write(self, block_ids: Sequence[int], rows: Rows) -> None:
        """Copy rows into these blocks."""
        for plane in self._planes:
            plane.pool[block_ids] = plane.part(rows, self._size)


def _planes(manifest: Manifest, shards: Sequence[Shard], pools: Sequence[KvPool]) -> Iterator[_Plane]:
    starts = [0]
    for shape in manifest.layers:
        for size in plane_bytes(shape, manifest.block_size, manifest.dtype):
            starts.append(starts[-1] + size)
    item, seen = ITEM_BYTES[manifest.dtype], set[tuple[int, int, int]]()
    for shard, pool in zip(shards, pools, strict=True):
        assert pool.memory is not None
        offsets = plane_offsets(pool.manifest, pool.num_blocks)
        for local, layer in enumerate(layers(len(manifest.layers), shard.part)):
            shape = manifest.layers[layer]
            own = heads(shape.kv_heads, shard.part)
            for half, dim in enumerate((shape.key_dim, shape.value_dim)):
                at, size = offsets[2 * local + half]
                raw = pool.memory.bytes[at : at + size * pool.num_blocks]
                where = (2 * layer + half, own.start, own.stop)
                yield _Plane(
                    raw.reshape(pool.num_blocks, manifest.block_size, size // manifest.block_size),
                    starts[2 * layer + half],
                    shape.kv_heads * dim * item,
                    own.start * dim * item,
                    where not in seen,
                )
                seen.add(where)


class GpuBlocks:
    """Of an engine with one GPU. Copies run on a stream of their own, beside the steps. Blocks are written where a
    transport would write them: to the copy of the pool in host memory if there is one (the core absorbs it), else to
    the GPU."""

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], pools: Sequence[KvPool]) -> None:
        self._pool = pools[0]
        self._planes = plane_offsets(manifest, self._pool.num_blocks)
        self.block_bytes = block_bytes(manifest)
        self._host = HostBlocks(manifest, shards, pools) if self._pool.memory is not None else None
        self._stream = _stream(self._pool.store.device)

    def read(self, block_ids: Sequence[int]) -> Rows:
        """A copy of these blocks."""
        with torch.cuda.stream(self._stream):
            ids = torch.tensor(block_ids, device=self._pool.store.device)
            parts = [plane.index_select(0, ids) for plane in self._views()]
            rows = torch.cat(parts, dim=1).to("cpu", non_blocking=False)
        return rows.numpy()

    def write(self, block_ids: Sequence[int], rows: Rows) -> None:
        """Copy rows into these blocks."""
        if self._host is not None:
            self._host.write(block_ids, rows)
            return
        with torch.cuda.stream(self._stream):
            device = self._pool.store.device
            ids, whole = torch.tensor(block_ids, device=device), torch.from_numpy(rows).to(device)
            at = 0
            for plane in self._views():
                plane.index_copy_(0, ids, whole[:, at : at + plane.shape[1]])
                at += plane.shape[1]
        if self._stream is not None:
            self._stream.synchronize()

    def _views(self) -> Iterator[torch.Tensor]:
        """Each plane, [blocks, bytes of a block]."""
        for offset, size in self._planes:
            num_bytes = size * self._pool.num_blocks
            yield self._pool.store[offset : offset + num_bytes].view(self._pool.num_blocks, size)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """One beside the steps. None on a CPU, which stands in for a GPU in tests."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


WholeBlocks = HostBlocks | GpuBlocks


def whole_blocks(manifest: Manifest, shards: Sequence[Shard], pools: Sequence[KvPool]) -> WholeBlocks:
    """Access to the blocks of an engine with these pools."""
    on_gpu = pools[0].store.device.type == "cuda"
    return (GpuBlocks if on_gpu else HostBlocks)(manifest, shards, pools)
