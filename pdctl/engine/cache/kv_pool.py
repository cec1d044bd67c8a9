"""The KV cache as tensors, indexed by the allocator's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdctl.engine.cache.columns import Columns, Slots, fill_device, fill_host
from pdctl.engine.cache.layout import block_bytes, plane_offsets
from pdctl.engine.cache.memory import Bytes, DeviceMemory, Memory, NoMemory
from pdctl.engine.cache.mirror import Mirror
from pdctl.wire import Manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """Per layer `keys[l]`: [slots, kv_heads, key_dim] and `values[l]`; slot = block * block_size + offset.

    On the CPU the tensors are views of `memory`. On a GPU the pool is in the GPU's memory. If transports need host
    memory, `mirror` gives it a copy there with the same layout, which `publish` copies blocks to. What is read from
    peers never goes through that copy: it would have older rows beside those that are new.
    """

    def __init__(
        self,
        manifest: Manifest,
        num_blocks: int,
        memory: Memory | None,
        device: torch.device,
        store: torch.Tensor | None = None,
        place: str = "",
    ) -> None:
        """`store`, `place`: of a pool that another process has allocated, see DeviceMemory."""
        # The memory must outlive the tensors over it.
        self.memory = memory
        self.manifest = manifest
        self.num_blocks = num_blocks
        self.block_size = manifest.block_size
        self._mirror: Mirror | None = None
        self._planes = plane_offsets(manifest, num_blocks)
        total = block_bytes(manifest) * num_blocks
        if memory is not None:
            assert device.type == "cpu"
            self.store = torch.frombuffer(memory.view, dtype=torch.uint8, count=total)
        else:
            self.store = store if store is not None else allocate(total, device)
        self._place = place
        self.is_on_host = memory is not None
        self._beside = stream_beside(device)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for index, shape in enumerate(manifest.layers):
            self.keys.append(self._plane(2 * index, shape.kv_heads, shape.key_dim))
            self.values.append(self._plane(2 * index + 1, shape.kv_heads, shape.value_dim))

    @property
    def device_memory(self) -> DeviceMemory:
        """The pool's place in a GPU's memory."""
        return DeviceMemory(self.store.data_ptr(), len(self.store), self.store.device.index or 0, self._place)

    def mirror(self, epoch: str) -> Memory:
        """The pool's bytes in host memory, a copy on a GPU. Raises NoMemory."""
        if self.memory is None:
            self.memory = Memory(len(self.store), epoch)
            self._mirror = Mirror(self.store, self.memory, self._planes, self.num_blocks)
        return self.memory

    def publish(self, block_ids: Sequence[int]) -> None:
        """Make blocks readable by peers."""
        if self._mirror is not None:
            self._mirror.publish(block_ids)

    def fill(self, read: Bytes, slots: Slots, columns: Sequence[Columns]) -> None:
        """See handover.Target.fill. Runs beside the steps, in any thread. Raises NoMemory."""
        if self.is_on_host:
            assert self.memory is not None
            fill_host([self._host_plane(self.memory, *plane) for plane in self._planes], read, slots, columns)
            return
        planes = [half.flatten(1) for layer in zip(self.keys, self.values, strict=True) for half in layer]
        try:
            with torch.cuda.stream(self._beside):
                fill_device(planes, read, slots, columns)
        except torch.OutOfMemoryError as failure:
            raise NoMemory(f"the GPU has no room for KV that has come: {failure}") from failure
        finally:
            # Also what was begun before an error is over then.
            if self._beside is not None:
                self._beside.synchronize()

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill freed blocks with NaN, so that a use after free is detected."""
        for tensor in (*self.keys, *self.values):
            blocks = tensor.view(self.num_blocks, self.block_size, *tensor.shape[1:])
            blocks[torch.tensor(block_ids, device=tensor.device)] = torch.nan
        self.publish(block_ids)
        # A transfer may write there next, on a stream of its own.
        self.settle()

    def settle(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.store.device.type == "cuda":
            torch.cuda.current_stream(self.store.device).synchronize()

    def _host_plane(self, memory: Memory, start: int, per_block: int) -> Bytes:
        """[slots, bytes of a row]."""
        raw = memory.bytes[start : start + per_block * self.num_blocks]
        return raw.reshape(-1, per_block // self.block_size)

    def _plane(self, index: int, heads: int, size: int) -> torch.Tensor:
        start, per_block = self._planes[index]
        raw = self.store[start : start + per_block * self.num_blocks]
        return raw.view(DTYPES[self.manifest.dtype]).view(self.num_blocks * self.block_size, heads, size)


def is_apart(device: torch.device) -> bool:
    """Whether pools of this device are in memory of its own, which is not the host's."""
    return device.type == "cuda"


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed memory of a device, [num_bytes]."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def stream_beside(device: torch.device) -> torch.cuda.Stream | None:
    """One for copies beside the steps. None on a CPU, which stands in for a GPU in tests."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
