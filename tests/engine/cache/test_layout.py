from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pdctl.engine.cache.layout import Half, block_bytes, mismatch, plane_offsets, spans
from pdctl.wire import LayerShape, Manifest

MANIFEST = Manifest("m", "float32", 4, [LayerShape(2, 3, 5), LayerShape(1, 7, 7)])


def test_planes_tile_the_pool() -> None:
    planes = plane_offsets(MANIFEST, 6)
    end = 0
    for start, size in planes:
        assert start == end
        end = start + 6 * size
    assert end == block_bytes(MANIFEST) * 6


def half(size: int, blocks: list[int], total: int = 16) -> Half:
    return Half(structs.replace(MANIFEST, block_size=size), total, blocks)


def row(half: Half, plane: int, token: int) -> slice:
    """The location of a token's K or V row, computed directly."""
    size = half.manifest.block_size
    start, per_block = plane_offsets(half.manifest, half.num_blocks)[plane]
    begin = start + half.block_ids[token // size] * per_block + token % size * (per_block // size)
    return slice(begin, begin + per_block // size)


@given(st.data(), st.sampled_from([1, 3, 4, 8]), st.sampled_from([1, 2, 4, 16]))
def test_spans_copy_exactly_the_chosen_tokens(data: st.DataObject, source_size: int, target_size: int) -> None:
    """Any block sizes on both sides, any first token and count."""
    tokens = data.draw(st.integers(1, 30))
    sources = data.draw(st.permutations(range(32)))[: -(-tokens // source_size)]
    targets = data.draw(st.permutations(range(31)))[: -(-tokens // target_size)]
    first = data.draw(st.integers(0, tokens))
    count = data.draw(st.integers(0, tokens - first))
    ours, theirs = half(target_size, targets, 31), half(source_size, sources, 32)
    source = np.random.default_rng(1).integers(0, 255, block_bytes(theirs.manifest) * 32, dtype=np.uint8)
    target = np.zeros(block_bytes(ours.manifest) * 31, dtype=np.uint8)
    expected = target.copy()
    for plane, token in itertools.product(range(4), range(first, first + count)):
        expected[row(ours, plane, token)] = source[row(theirs, plane, token)]
    for span in spans(theirs, ours, first, count):
        target[span.target : span.target + span.length] = source[span.source : span.source + span.length]
    assert (target == expected).all()


def test_runs_are_merged() -> None:
    assert len(spans(half(4, [3, 4, 5]), half(4, [0, 1, 2]), 0, 12)) == 4, "one span a plane"
    assert len(spans(half(4, [3, 4, 5]), half(4, [0, 2, 1]), 0, 12)) == 12
    assert len(spans(half(4, [2, 3]), half(8, [0]), 0, 8)) == 4, "block sizes do not cut what lies together"


@pytest.mark.parametrize(
    ("sources", "targets", "first", "count"),
    [([16], [0], 0, 4), ([-1], [0], 0, 4), ([0], [16], 0, 4), ([0, 1], [0], 0, 8), ([0], [0], 3, 2), ([0], [0], -1, 2)],
    ids=["high", "negative", "target", "length", "past the end", "before the start"],
)
def test_blocks_outside_the_pools_are_refused(sources: list[int], targets: list[int], first: int, count: int) -> None:
    with pytest.raises(ValueError, match="block"):
        spans(half(4, sources), half(4, targets), first, count)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"model": "other"}, "models differ"), ({"dtype": "bfloat16"}, "bfloat16"), ({"layers": []}, "layers or heads")],
)
def test_pools_that_do_not_fit_are_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    theirs = structs.replace(MANIFEST, **change)
    assert reason in mismatch(MANIFEST, theirs)
    with pytest.raises(ValueError, match=reason):
        spans(Half(theirs, 8, [0]), half(4, [0]), 0, 1)


def test_another_block_size_fits() -> None:
    assert mismatch(MANIFEST, structs.replace(MANIFEST, block_size=32)) == ""
