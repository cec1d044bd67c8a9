"""What the stand-in for GPUs changes in the modules of an engine."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from pdctl.engine.cache.memory import Memory
from tests.fakes import cudart
from tests.fakes.gpu import LIBRARIES_ENV

kept: list[Memory] = []


def apply(module: ModuleType) -> None:
    """Change what concerns the place of pools."""
    if module.__name__.endswith("kv_pool"):
        cudart.use(Path(os.environ[LIBRARIES_ENV]))
        module.is_apart = lambda device: True  # type: ignore[attr-defined]
        module.allocate = allocate  # type: ignore[attr-defined]
    elif module.__name__.endswith("exported"):
        module.tensor_at = tensor_at  # type: ignore[attr-defined]
    else:
        module.measured = measured  # type: ignore[attr-defined]


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """See kv_pool.allocate. A memory file, which the runtime of the tests can export."""
    memory = Memory(num_bytes, "gpu")
    kept.append(memory)
    return torch.frombuffer(memory.view, dtype=torch.uint8)


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """See exported.tensor_at."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def room_of(rank: int) -> int:
    """Bytes that each rank's GPU has for KV: later ones have less."""
    return (48 - 8 * rank) << 20


def measured(device: torch.device, weights: int, step: Callable[[], object]) -> object:
    """See gpu_memory.measured. Of a GPU in which `room_of` bytes are left."""
    from pdctl.engine.executor import gpu_memory

    step()
    rank = int(sys.argv[sys.argv.index("--rank") + 1]) if "--rank" in sys.argv else 0
    size = gpu_memory._EXTRA_BYTES + room_of(rank)
    return gpu_memory.Usage(size, size, 0, 0)
