"""Why a step failed, in a sentence for `pdctl why`. An error of the GPU ends the engine: nothing that it computes after
one can be trusted, and no token of the failed step has been sent."""

from __future__ import annotations

import torch

_LONGEST = 300


def reason_of(failure: Exception) -> str:
    """The reason, without what libraries say about debugging."""
    said = str(failure).strip() or type(failure).__name__
    first_line = said.splitlines()[0]
    if isinstance(failure, torch.OutOfMemoryError):
        # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        what = ". ".join(first_line.split(". ")[:2]).rstrip(".")
        return f"the GPU's memory ran out in a step: {what}; lower gpu_memory_utilization or kv_cache_gb"[:_LONGEST]
    if "CUDA" in first_line or "NCCL" in first_line:
        return f"the GPU failed in a step: {first_line}"[:_LONGEST]
    return f"a step failed: {type(failure).__name__}: {first_line}"[:_LONGEST]
