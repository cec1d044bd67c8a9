"""Copies of blocks from a pool to its mirror, with a second CPU store instead of the device."""

from __future__ import annotations

import pytest
import torch

from pdctl.engine.cache import mirror
from pdctl.engine.cache.layout import block_bytes, plane_offsets
from pdctl.engine.cache.memory import Memory
from pdctl.engine.cache.mirror import Mirror
from pdctl.wire import LayerShape, Manifest

BLOCKS = 40
SAME = [LayerShape(2, 8, 8)] * 3
# Keys and values of different sizes, and a layer with other heads.
MIXED = [LayerShape(2, 24, 16), LayerShape(2, 24, 16), LayerShape(1, 16, 16), LayerShape(4, 8, 8)]


def blocks_of(raw: torch.Tensor, manifest: Manifest, block: int) -> list[torch.Tensor]:
    return [raw[at + block * size : at + (block + 1) * size] for at, size in plane_offsets(manifest, BLOCKS)]


@pytest.mark.parametrize("layers", [SAME, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize("staging", [1, 5000, 32 << 20], ids=["a block", "a few", "all"])
@pytest.mark.parametrize("ids", [[], [7], list(range(BLOCKS)), [39, 0, 17, 3, 21, 4, 5, 6]], ids=len)
def test_the_blocks_arrive_and_no_others(
    ids: list[int], staging: int, layers: list[LayerShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_STAGING_BYTES", staging)
    manifest = Manifest("m", "float32", 4, layers)
    total = block_bytes(manifest) * BLOCKS
    generator = torch.Generator().manual_seed(len(ids))
    store = torch.randint(1, 256, (total,), dtype=torch.uint8, generator=generator)
    memory = Memory(total, "test")
    made = Mirror(store, memory, plane_offsets(manifest, BLOCKS), BLOCKS)
    host = torch.frombuffer(memory.view, dtype=torch.uint8)

    made.publish(ids)
    for block in range(BLOCKS):
        for ours, theirs in zip(blocks_of(store, manifest, block), blocks_of(host, manifest, block), strict=True):
            assert torch.equal(theirs, ours if block in ids else torch.zeros_like(ours))

    memory.close()


def test_adjacent_planes_of_one_size_are_copied_as_one() -> None:
    manifest = Manifest("m", "float32", 4, SAME)
    assert len(list(mirror._runs(plane_offsets(manifest, BLOCKS)))) == 1
    mixed = plane_offsets(Manifest("m", "float32", 4, MIXED), BLOCKS)
    assert [count for _, count, _ in mirror._runs(mixed)] == [1, 1, 1, 1, 2, 2]
