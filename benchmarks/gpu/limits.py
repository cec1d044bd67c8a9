"""The device's measured limits: bytes read per second, bf16 operations per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(act: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Median seconds of one call, with an empty device queue before and after."""
    found = []
    for _ in range(rounds + 3):
        _settle(device)
        started = time.perf_counter()
        act()
        _settle(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[3:])


def copy_bytes_per_second(device: torch.device) -> float:
    """A large copy within the device; bytes read and written are added."""
    size = 2**32 if device.type == "cuda" else 2**25
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matrix_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """A large square product of random matrices."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    b = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ b, device)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
