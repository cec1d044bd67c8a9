"""The layout of a KV pool in bytes.

Layer-major: all K blocks of layer 0, all V blocks of layer 0, then layer 1 and so on. A contiguous run of blocks is
contiguous memory per layer, for attention and for transfers.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from pdctl.wire import LayerShape, Manifest

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Span(NamedTuple):
    """`length` bytes from `source` in the peer's pool to `target` in ours."""

    source: int
    target: int
    length: int


def plane_bytes(shape: LayerShape, block_size: int, dtype: str) -> tuple[int, int]:
    """Bytes of one block's K and of one block's V in this layer."""
    row = block_size * shape.kv_heads * ITEM_BYTES[dtype]
    return row * shape.key_dim, row * shape.value_dim


def block_bytes(manifest: Manifest) -> int:
    """Bytes of one block over all layers, K and V."""
    return sum(sum(plane_bytes(shape, manifest.block_size, manifest.dtype)) for shape in manifest.layers)


def plane_offsets(manifest: Manifest, num_blocks: int) -> list[tuple[int, int]]:
    """(offset of the plane, bytes per block) for K and V of each layer in order."""
    sizes = [size for shape in manifest.layers for size in plane_bytes(shape, manifest.block_size, manifest.dtype)]
    starts = accumulate((size * num_blocks for size in sizes[:-1]), initial=0)
    return list(zip(starts, sizes, strict=True))


class Half(NamedTuple):
    """One side of a transfer: a pool of `num_blocks` described by `manifest`, and a sequence's blocks in it."""

    manifest: Manifest
    num_blocks: int
    block_ids: list[int]


def mismatch(ours: Manifest, theirs: Manifest) -> str:
    """Why KV of `theirs` cannot be used here, else "". Block sizes may differ: tokens are copied, not blocks."""
    if ours.model != theirs.model:
        return f"the models differ: {theirs.model[:12]} there, {ours.model[:12]} here"
    if ours.dtype != theirs.dtype:
        return f"KV is {theirs.dtype} there and {ours.dtype} here"
    if ours.layers != theirs.layers:
        return f"layers or heads differ: {len(theirs.layers)} layers there, {len(ours.layers)} here"
    return ""


def spans(source: Half, target: Half, first: int, count: int) -> list[Span]:
    """The copies that move tokens `first` to `first + count` of a sequence from `source` to `target`, merged.

    Raises ValueError for manifests that do not fit together, block ids outside a pool, or too few blocks.
    """
    if reason := mismatch(target.manifest, source.manifest):
        raise ValueError(reason)
    check(source, "the peer's", first, count)
    check(target, "our", first, count)
    runs = _runs(source, target, first, count)
    found = []
    for (source_start, source_size), (target_start, target_size) in zip(rows(source), rows(target), strict=True):
        assert source_size == target_size
        found += [
            Span(source_start + from_ * source_size, target_start + to * source_size, tokens * source_size)
            for from_, to, tokens in runs
        ]
    return found


def check(half: Half, where: str, first: int, count: int) -> None:
    """Raise ValueError for block ids outside the pool, or too few blocks for tokens `first` to `first + count`."""
    if any(not 0 <= block < half.num_blocks for block in half.block_ids):
        raise ValueError(f"a block lies outside {where} pool of {half.num_blocks}")
    if first < 0 or count < 0 or first + count > len(half.block_ids) * half.manifest.block_size:
        raise ValueError(f"tokens {first} to {first + count} need more than {len(half.block_ids)} blocks")


def slot(half: Half, token: int) -> tuple[int, int]:
    """A token's slot in the pool, and the number of tokens from there to the end of its block."""
    block, offset = divmod(token, half.manifest.block_size)
    return half.block_ids[block] * half.manifest.block_size + offset, half.manifest.block_size - offset


def rows(half: Half) -> list[tuple[int, int]]:
    """(offset of the plane, bytes per token) for K and V of each layer."""
    size = half.manifest.block_size
    return [(start, per_block // size) for start, per_block in plane_offsets(half.manifest, half.num_blocks)]


def _runs(source: Half, target: Half, first: int, count: int) -> list[tuple[int, int, int]]:
    """(source slot, target slot, tokens) of pieces that are contiguous on both sides."""
    runs: list[tuple[int, int, int]] = []
    token, end = first, first + count
    while token < end:
        from_, source_left = slot(source, token)
        to, target_left = slot(target, token)
        tokens = min(source_left, target_left, end - token)
        if runs and from_ == runs[-1][0] + runs[-1][2] and to == runs[-1][1] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + tokens)
        else:
            runs.append((from_, to, tokens))
        token += tokens
    return runs
