"""The number type that an engine computes in."""

from __future__ import annotations

import torch

from pdctl.engine.cache.kv_pool import DTYPES
from pdctl.engine.model.native import NotCompiled, library
from pdctl.engine.model.products import packs


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`wanted`: a name, or "auto": bfloat16 on a GPU and on a CPU that is fast in it, else float32.

    On a CPU, bfloat16 is chosen only where our own attention kernel runs and products do not depend on the number of
    rows. With both, a token's logits are the same bits alone, in a batch, or in a prompt. With sums in another order,
    an answer that goes on after a failover would be another one where tokens are nearly tied (9 of 36 answers:
    docs/performance.md).
    """
    if wanted != "auto":
        return DTYPES[wanted]
    return torch.bfloat16 if device.type != "cpu" or _is_fast_in_bfloat16() else torch.float32


def _is_fast_in_bfloat16() -> bool:
    can = torch.cpu.get_capabilities()
    # More threads than one divide sums in other ways, and our kernel has one.
    if not (can.get("avx512_bf16") or can.get("amx_bf16")) or torch.get_num_threads() > 1:
        return False
    try:
        library()
    except NotCompiled:
        return False
    return packs(torch.bfloat16)
