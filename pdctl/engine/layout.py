"""Where each block of a KV pool lies, in bytes.

Layer-major: all K blocks of layer 0, all V blocks of layer 0, then layer 1 ... so that a contiguous run of blocks is
contiguous memory per layer, for attention and for transfers alike.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
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


def spans(
    manifest: Manifest,
    source_blocks: list[int],
    source_total: int,
    target_blocks: list[int],
    target_total: int,
) -> list[Span]:
    """The copies that bring `source_blocks` of a pool of `source_total` into our `target_blocks`, merged.

    Raises ValueError for block ids outside either pool, or lists of different length.
    """
    if len(source_blocks) != len(target_blocks):
        raise ValueError(f"{len(source_blocks)} blocks offered for {len(target_blocks)} reserved")
    if any(not 0 <= block < source_total for block in source_blocks):
        raise ValueError(f"a source block lies outside the peer's pool of {source_total}")
    if any(not 0 <= block < target_total for block in target_blocks):
        raise ValueError(f"a target block lies outside our pool of {target_total}")
    runs = _runs(source_blocks, target_blocks)
    planes = zip(plane_offsets(manifest, source_total), plane_offsets(manifest, target_total), strict=True)
    return [
        Span(source_start + source * size, target_start + target * size, count * size)
        for (source_start, size), (target_start, _) in planes
        for source, target, count in runs
    ]


def _runs(sources: list[int], targets: list[int]) -> list[tuple[int, int, int]]:
    """(source, target, count) where both sides go on block by block."""
    pairs = list(zip(sources, targets, strict=True))
    breaks = [
        index
        for index, ((source, target), (next_source, next_target)) in enumerate(pairwise(pairs), 1)
        if next_source != source + 1 or next_target != target + 1
    ]
    return [(*pairs[start], end - start) for start, end in pairwise([0, *breaks, len(pairs)]) if end > start]
