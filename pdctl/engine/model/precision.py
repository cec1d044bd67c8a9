"""The number type that an engine computes in."""

from __future__ import annotations

import torch

from pdctl.engine.cache.kv_pool import DTYPES


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`wanted`: a name, or "auto": bfloat16 on a GPU, float32 on a CPU.

    bfloat16 would be faster on some CPUs, but an answer that goes on after a failover is then another one where tokens
    are nearly tied (9 of 36 answers, none in float32: docs/performance.md).
    """
    if wanted != "auto":
        return DTYPES[wanted]
    return torch.float32 if device.type == "cpu" else torch.bfloat16
