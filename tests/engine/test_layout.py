from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.layout import block_bytes, plane_offsets, spans
from pdctl.wire import LayerShape, Manifest

MANIFEST = Manifest("m", "float32", 4, [LayerShape(2, 3, 5), LayerShape(1, 7, 7)])


def test_planes_tile_the_pool() -> None:
    planes = plane_offsets(MANIFEST, 6)
    end = 0
    for start, size in planes:
        assert start == end
        end = start + 6 * size
    assert end == block_bytes(MANIFEST) * 6


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_spans_copy_exactly_the_chosen_blocks(count: int, chance: object) -> None:
    source_total, target_total = 16, 13
    sources = chance.sample(range(source_total), count)  # type: ignore[attr-defined]
    targets = chance.sample(range(target_total), count)  # type: ignore[attr-defined]
    source = np.random.default_rng(1).integers(0, 255, block_bytes(MANIFEST) * source_total, dtype=np.uint8)
    target = np.zeros(block_bytes(MANIFEST) * target_total, dtype=np.uint8)
    expected = target.copy()
    for (s0, size), (t0, _) in zip(
        plane_offsets(MANIFEST, source_total), plane_offsets(MANIFEST, target_total), strict=True
    ):
        for s, t in zip(sources, targets, strict=True):
            expected[t0 + t * size : t0 + (t + 1) * size] = source[s0 + s * size : s0 + (s + 1) * size]
    for span in spans(MANIFEST, sources, source_total, targets, target_total):
        target[span.target : span.target + span.length] = source[span.source : span.source + span.length]
    assert (target == expected).all()


def test_runs_are_merged() -> None:
    assert len(spans(MANIFEST, [3, 4, 5], 8, [0, 1, 2], 8)) == 4, "one span a plane"
    assert len(spans(MANIFEST, [3, 4, 5], 8, [0, 2, 1], 8)) == 12


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([8], [0]), ([-1], [0]), ([0], [8]), ([0, 1], [0])],
    ids=["high", "negative", "target", "length"],
)
def test_blocks_outside_the_pools_are_refused(sources: list[int], targets: list[int]) -> None:
    with pytest.raises(ValueError, match="block"):
        spans(MANIFEST, sources, 8, targets, 8)
