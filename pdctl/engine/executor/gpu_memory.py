"""How much of a GPU's memory the KV pool gets: what the weights and the largest step leave of the engine's share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

# For the CUDA context, kernels, graphs, and what the allocator cannot use. pdctl's own estimate.
_EXTRA_BYTES = 1 << 30


class Usage(NamedTuple):
    """Bytes of a GPU. `free`: now, of `total`. `weights`: what this process has allocated. `step`: what the largest
    step takes in addition, for a while."""

    total: int
    free: int
    weights: int
    step: int


def kv_bytes(usage: Usage, share: float) -> int:
    """What is left for KV of this `share` of the GPU, at most what is free. Raises ModelRefused if nothing is."""
    needed = usage.step + _EXTRA_BYTES
    left = min(int(usage.total * share) - usage.weights, usage.free) - needed
    if left <= 0:
        gib = 2**30
        raise ModelRefused(
            f"gpu_memory_utilization = {share:g} of {usage.total / gib:.1f} GiB leaves no room for KV: weights take "
            f"{usage.weights / gib:.1f} GiB, a step {needed / gib:.1f} GiB, and {usage.free / gib:.1f} GiB are free; "
            "raise it, or lower max_num_batched_tokens or max_num_seqs"
        )
    return left


def largest_step(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int) -> list[Slice]:
    """A step with as many tokens and as many sampled rows as a step may have. All its sequences use the same blocks,
    from 0 on."""
    count = min(max_num_seqs, max_num_batched_tokens)
    each = max(1, min(max_num_batched_tokens // count, max_model_len - 1))
    first = max(each, min(max_num_batched_tokens - each * (count - 1), max_model_len - 1))
    batch = []
    for number, tokens in enumerate([first] + [each] * (count - 1)):
        sampling = Sampling(1, temperature=1.0, top_p=0.9, top_k=50, ignore_eos=True)
        blocks = list(range(-(-tokens // block_size)))
        sequence = Sequence(f"largest {number}", [1] * tokens, tokens, sampling, block_ids=blocks)
        batch.append(Slice(sequence, 0, tokens, samples=True))
    return batch


def measured(device: torch.device, weights: int, step: Callable[[], None]) -> Usage:
    """Run `step`, which frees what it takes, and measure it. `weights`: bytes that were allocated before."""
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return Usage(total, free, weights, peak - weights)
