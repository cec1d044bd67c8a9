"""The KV cache as tensors, indexed by the allocator's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdctl.engine.cache.layout import block_bytes, plane_offsets
from pdctl.engine.cache.memory import Memory
from pdctl.wire import Manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """Per layer `keys[l]`: [slots, kv_heads, key_dim] and `values[l]`; slot = block * block_size + offset.

    On the CPU the tensors are views of the shared memory. On a GPU the memory is a host mirror with the same layout,
    and `publish` and `absorb` copy blocks between the two.
    """

    def __init__(self, manifest: Manifest, num_blocks: int, memory: Memory, device: torch.device) -> None:
        # The memory must outlive the tensors over it.
        self.memory = memory
        self.manifest = manifest
        self.num_blocks = num_blocks
        self.block_size = manifest.block_size
        total = block_bytes(manifest) * num_blocks
        host = torch.frombuffer(memory.view, dtype=torch.uint8, count=total)
        self._mirror = None if device.type == "cpu" else host
        store = host if self._mirror is None else torch.zeros(total, dtype=torch.uint8, device=device)
        self._store = store
        self._planes = plane_offsets(manifest, num_blocks)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for index, shape in enumerate(manifest.layers):
            self.keys.append(self._plane(2 * index, shape.kv_heads, shape.key_dim))
            self.values.append(self._plane(2 * index + 1, shape.kv_heads, shape.value_dim))

    def publish(self, block_ids: Sequence[int]) -> None:
        """Make blocks readable by peers."""
        if self._mirror is not None:
            self._copy(self._store, self._mirror, block_ids)

    def absorb(self, block_ids: Sequence[int]) -> None:
        """Copy blocks that a transfer has written into the pool."""
        if self._mirror is not None:
            self._copy(self._mirror, self._store, block_ids)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill freed blocks with NaN, so that a use after free is detected."""
        for tensor in (*self.keys, *self.values):
            blocks = tensor.view(self.num_blocks, self.block_size, *tensor.shape[1:])
            blocks[torch.tensor(block_ids, device=tensor.device)] = torch.nan
        self.publish(block_ids)

    def _plane(self, index: int, heads: int, size: int) -> torch.Tensor:
        start, per_block = self._planes[index]
        raw = self._store[start : start + per_block * self.num_blocks]
        return raw.view(DTYPES[self.manifest.dtype]).view(self.num_blocks * self.block_size, heads, size)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, block_ids: Sequence[int]) -> None:
        for start, per_block in self._planes:
            for block in block_ids:
                begin = start + block * per_block
                target[begin : begin + per_block].copy_(source[begin : begin + per_block])
