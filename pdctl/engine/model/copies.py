"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to this device. On a GPU the copy is queued: from pageable memory, torch would first
    wait for everything that is queued there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
