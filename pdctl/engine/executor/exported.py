"""KV pools in the memory of GPUs, each allocated by the rank that computes with it, and mapped by the core: so
transfers, tiers and copies need no other process, as on CPUs.

The core may read a block when its own part of the step is computed: that waits for what the others add to it, which
they do after they have written their KV.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.transfer.cuda_runtime import CudaError, CudaRuntime
from pdctl.wire import Manifest

_HINT = (
    "; ranks on GPUs need CUDA IPC, which containers with GPUs of their own, WSL, and PYTORCH_CUDA_ALLOC_CONF with "
    "expandable_segments or cudaMallocAsync do not have"
)


class _Mapped:
    """A piece of a GPU's memory for torch, by the protocol `__cuda_array_interface__`."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (num_bytes,), "typestr": "|u1", "strides": None, "version": 3,
        }  # fmt: skip


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes at an address of a GPU, [num_bytes]. They must outlive the tensor."""
    return torch.as_tensor(_Mapped(address, num_bytes), device=device)


def export(pool: KvPool) -> str:
    """Where another process of this host finds the pool, for `mapped`. Raises ModelRefused."""
    try:
        return CudaRuntime().place(pool.device_memory.base)
    except CudaError as failure:
        raise ModelRefused(f"a rank's KV cannot be mapped by the engine's core: {failure}{_HINT}") from failure


def mapped(
    manifests: Sequence[Manifest], num_blocks: int, places: Sequence[str], devices: Sequence[torch.device]
) -> list[KvPool]:
    """The pools of other ranks, with what each has of the KV. They are mapped until this process ends. Raises
    ModelRefused."""
    cuda, found = CudaRuntime(), []
    try:
        for manifest, place, device in zip(manifests, places, devices, strict=True):
            offset, handle = place.split("/")
            cuda.set_device(device.index or 0)
            address = cuda.map(bytes.fromhex(handle)) + int(offset)
            store = tensor_at(address, num_blocks * block_bytes(manifest), device)
            found.append(KvPool(manifest, num_blocks, None, device, store, place))
        cuda.set_device(0)
    except CudaError as failure:
        raise ModelRefused(f"another rank's KV cannot be mapped: {failure}{_HINT}") from failure
    return found
