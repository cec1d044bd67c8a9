"""Whole blocks of an engine as bytes: gathered from the pools of all its devices, and spread over them.

A block's bytes are the same whatever the engine's width, so an engine of another width can use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pdctl.engine.cache.kv_pool import KvPool, stream_beside
from pdctl.engine.cache.layout import ITEM_BYTES, block_bytes, plane_bytes, plane_offsets
from pdctl.engine.cache.memory import Bytes
from pdctl.engine.cache.shards import Shard, heads, layers
from pdctl.engine.tiers import Rows, TierFailed
from pdctl.wire import Manifest


class _Place(NamedTuple):
    """The place of a pool's plane in a whole block: of each token's row of `row` bytes there, `length` bytes from
    `first`. `is_first`: no pool before this one has the same."""

    start: int
    row: int
    first: int
    length: int
    is_first: bool

    def part(self, rows: Rows, block_size: int) -> Bytes:
        """Its place in these rows: a view, [blocks, tokens, bytes of a token]."""
        whole = rows[:, self.start : self.start + block_size * self.row].reshape(len(rows), block_size, self.row)
        return whole[:, :, self.first : self.first + self.length]


class _Blocks(Protocol):
    """The blocks of one pool."""

    def read(self, block_ids: Sequence[int]) -> Iterator[Bytes]:
        """A copy of these blocks of each plane, [blocks, bytes]."""
        ...

    def write(self, block_ids: Sequence[int], parts: Sequence[Bytes]) -> None:
        """Copy into these blocks of each plane, [blocks, tokens, bytes of a token]."""
        ...


class _OnHost:
    """See _Blocks."""

    def __init__(self, pool: KvPool) -> None:
        assert pool.memory is not None
        raw = pool.memory.bytes
        self._planes = [
            raw[at : at + size * pool.num_blocks].reshape(pool.num_blocks, size)
            for at, size in plane_offsets(pool.manifest, pool.num_blocks)
        ]

    def read(self, block_ids: Sequence[int]) -> Iterator[Bytes]:
        """See _Blocks.read."""
        return (plane[block_ids] for plane in self._planes)

    def write(self, block_ids: Sequence[int], parts: Sequence[Bytes]) -> None:
        """See _Blocks.write."""
        for plane, part in zip(self._planes, parts, strict=True):
            plane[block_ids] = part.reshape(len(block_ids), -1)


class _OnDevice:
    """See _Blocks. All planes cross the bus together, on a stream beside the steps. What there is no room for on the
    device fails as a tier does."""

    def __init__(self, pool: KvPool) -> None:
        self._device = pool.store.device
        self._stream = stream_beside(self._device)
        self._planes = [
            pool.store[at : at + size * pool.num_blocks].view(pool.num_blocks, size)
            for at, size in plane_offsets(pool.manifest, pool.num_blocks)
        ]
        self._ends = list(accumulate(plane.shape[1] for plane in self._planes))

    def read(self, block_ids: Sequence[int]) -> Iterator[Bytes]:
        """See _Blocks.read."""
        with _room(), torch.cuda.stream(self._stream):
            ids = torch.tensor(block_ids, device=self._device)
            whole = torch.cat([plane.index_select(0, ids) for plane in self._planes], dim=1).to("cpu")
        return iter(np.split(whole.numpy(), self._ends[:-1], axis=1))

    def write(self, block_ids: Sequence[int], parts: Sequence[Bytes]) -> None:
        """See _Blocks.write."""
        whole = torch.from_numpy(np.concatenate([part.reshape(len(block_ids), -1) for part in parts], axis=1))
        with _room(), torch.cuda.stream(self._stream):
            ids, there = torch.tensor(block_ids, device=self._device), whole.to(self._device)
            for plane, part in zip(self._planes, torch.tensor_split(there, self._ends[:-1], dim=1), strict=True):
                plane.index_copy_(0, ids, part)
        if self._stream is not None:
            self._stream.synchronize()


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as failure:
        raise TierFailed(f"the GPU has no room for a copy: {failure}") from failure


class WholeBlocks:
    """The blocks of an engine with these pools, on the host or on devices."""

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], pools: Sequence[KvPool]) -> None:
        self.block_bytes = block_bytes(manifest)
        self._size = manifest.block_size
        kinds = [(_OnHost if pool.is_on_host else _OnDevice)(pool) for pool in pools]
        self._pools: list[tuple[_Blocks, list[_Place]]] = list(zip(kinds, _places(manifest, shards), strict=True))

    def read(self, block_ids: Sequence[int]) -> Rows:
        """A copy of these blocks. Raises TierFailed."""
        rows = np.empty((len(block_ids), self.block_bytes), np.uint8)
        for pool, places in self._pools:
            if any(place.is_first for place in places):
                for place, part in zip(places, pool.read(block_ids), strict=True):
                    place.part(rows, self._size)[:] = part.reshape(len(block_ids), self._size, -1)
        return rows

    def write(self, block_ids: Sequence[int], rows: Rows) -> None:
        """Copy rows into these blocks. Raises TierFailed."""
        for pool, places in self._pools:
            pool.write(block_ids, [place.part(rows, self._size) for place in places])


def _places(manifest: Manifest, shards: Sequence[Shard]) -> Iterator[list[_Place]]:
    """Of each shard's planes."""
    sizes = [size for shape in manifest.layers for size in plane_bytes(shape, manifest.block_size, manifest.dtype)]
    starts = list(accumulate(sizes, initial=0))
    item, seen = ITEM_BYTES[manifest.dtype], set[tuple[int, int, int]]()
    for shard in shards:
        found = []
        for layer in layers(len(manifest.layers), shard.part):
            shape = manifest.layers[layer]
            own = heads(shape.kv_heads, shard.part)
            for half, dim in enumerate((shape.key_dim * item, shape.value_dim * item)):
                plane, where = 2 * layer + half, (2 * layer + half, own.start, own.stop)
                place = _Place(starts[plane], shape.kv_heads * dim, own.start * dim, len(own) * dim, where not in seen)
                found.append(place)
                seen.add(where)
        yield found
