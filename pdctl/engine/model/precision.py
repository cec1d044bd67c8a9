"""The number type that an engine computes in."""

from __future__ import annotations

from pathlib import Path

import torch

from pdctl.engine.cache.kv_pool import DTYPES
from pdctl.engine.model.products import packs
from pdctl.host.cpu import computes_bfloat16
from pdctl.host.models import stated_dtype


def choose_dtype(wanted: str, device: torch.device, model: Path, proc_root: Path = Path("/proc")) -> torch.dtype:
    """`wanted`: a name, or "auto": bfloat16 on a GPU, and on CPUs that are faster in it if the model's weights are
    bfloat16 anyway. Else float32: rounding the weights of a float32 model would change it."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type != "cpu":
        return torch.bfloat16
    fast = packs(torch.bfloat16) and computes_bfloat16(proc_root)
    return torch.bfloat16 if fast and stated_dtype(model) == "bfloat16" else torch.float32
