"""How much memory the KV pool gets: `kv_cache_gb`, or what the weights and the largest step leave of the engine's share
of a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch

from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host.memory import read_memory
from pdctl.wire import Manifest

_FEWEST_BLOCKS = 8
# For the CUDA context, kernels, graphs, and what the allocator cannot use. pdctl's own estimate.
_EXTRA_BYTES = 1 << 30


class Usage(NamedTuple):
    """Bytes of a GPU. `free`: now, of `total`. `weights`: what this process has allocated. `step`: what the largest
    step takes in addition, for a while."""

    total: int
    free: int
    weights: int
    step: int


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else read_memory()[1]


def number_of_blocks(options: EngineOptions, sizes: Several[int], free: Several[int]) -> int:
    """The number of blocks that fit into `kv_cache_gb`. `sizes`: bytes of one on each device; `free`: bytes there.
    Raises ModelRefused."""
    wanted, size = f"kv_cache_gb = {options.kv_cache_gb:g}", sum(sizes)
    num_blocks = int(options.kv_cache_gb * 2**30) // size
    if num_blocks < _FEWEST_BLOCKS:
        raise ModelRefused(
            f"{wanted} holds {num_blocks} blocks of {size} bytes; "
            f"raise it to {_FEWEST_BLOCKS * size / 2**30:.3g} at least, for {_FEWEST_BLOCKS} blocks"
        )
    for each, available in zip(sizes, free, strict=True):
        if num_blocks * each > available:
            where = "a GPU's memory" if options.device == "cuda" else "memory"
            part = f"{num_blocks * each / 2**30:.1f} of " if len(sizes) > 1 else ""
            raise ModelRefused(f"{wanted} does not fit: {part}{available / 2**30:.1f} GiB of {where} are free")
    return num_blocks


def blocks_in(num_bytes: int, manifest: Manifest) -> int:
    """The number of blocks of a GPU's pool."""
    return max(_FEWEST_BLOCKS, num_bytes // block_bytes(manifest))


def blocks_of_largest_step(options: EngineOptions) -> int:
    """The number of blocks that it uses."""
    return max(len(piece.sequence.block_ids) for piece in _largest(options))


def room_for_kv(options: EngineOptions, device: torch.device, runner_over: Callable[[int], ModelRunner]) -> int:
    """Bytes for KV on a GPU, after a step of the largest size. `runner_over`: one over a pool of so many blocks. Raises
    ModelRefused, torch.OutOfMemoryError."""
    blocks, batch = blocks_of_largest_step(options), _largest(options)
    return room_after(options, device, lambda: runner_over(blocks).execute(batch))


def room_after(options: EngineOptions, device: torch.device, step: Callable[[], object]) -> int:
    """Bytes for KV on a GPU, after this `step`, which frees what it takes. Raises ModelRefused."""
    weights = torch.cuda.memory_allocated(device)
    return kv_bytes(measured(device, weights, step), options.gpu_memory_utilization)


def _largest(options: EngineOptions) -> list[Slice]:
    return largest_step(options.max_num_seqs, options.max_num_batched_tokens, options.max_model_len, options.block_size)


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


def measured(device: torch.device, weights: int, step: Callable[[], object]) -> Usage:
    """Run `step`, which frees what it takes, and measure it. `weights`: bytes that were allocated before."""
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return Usage(total, free, weights, peak - weights)
