"""Whole blocks as bytes: the same whatever the width of the engine that they come from, or go to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.cache.shards import Shard, local
from pdctl.engine.tiers import TierFailed
from pdctl.engine.tiers.blocks import WholeBlocks
from pdctl.wire import LayerShape, Manifest, Part

MANIFEST = Manifest("m", "float32", 4, [LayerShape(4, 2, 3), LayerShape(2, 5, 5), LayerShape(1, 2, 2)])
BLOCKS = 6
WIDTHS = {
    "one": [Part()],
    "tensor 2": [Part(0, 2), Part(1, 2)],
    "tensor 4": [Part(rank, 4) for rank in range(4)],
    "pipeline 2": [Part(0, 1, 0, 2), Part(0, 1, 2, 1)],
    "both": [Part(0, 2, 0, 2), Part(1, 2, 0, 2), Part(0, 2, 2, 1), Part(1, 2, 2, 1)],
    "stripes": [Part(), Part()],
}


def pools(parts: list[Part], on_host: bool = True) -> tuple[list[Shard], list[KvPool]]:
    """Those that are not on the host have a device's code over the CPU."""
    shards = [Shard(MANIFEST, BLOCKS, part) for part in parts]
    made = []
    for part in parts:
        manifest = local(MANIFEST, part)
        memory = Memory(block_bytes(manifest) * BLOCKS, "e") if on_host else None
        made.append(KvPool(manifest, BLOCKS, memory, torch.device("cpu")))
    return shards, made


def blocks(parts: list[Part], on_host: bool = True) -> WholeBlocks:
    return WholeBlocks(MANIFEST, *pools(parts, on_host))


@pytest.mark.parametrize("theirs", WIDTHS)
@pytest.mark.parametrize("ours", WIDTHS)
@pytest.mark.parametrize("places", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_what_one_width_wrote_another_reads(ours: str, theirs: str, places: tuple[bool, bool]) -> None:
    one, other = blocks(WIDTHS[ours], places[0]), blocks(WIDTHS[theirs], places[1])
    rows = np.random.default_rng(0).integers(0, 256, (2, one.block_bytes), dtype=np.uint8)
    one.write([4, 1], rows)
    other.write([0, 5], one.read([4, 1]))
    assert (other.read([0, 5]) == rows).all()
    assert not other.read([1, 2, 3, 4]).any(), "nothing else was touched"


def test_every_shard_gets_its_own_heads() -> None:
    shards, made = pools(WIDTHS["tensor 2"])
    both = WholeBlocks(MANIFEST, shards, made)
    whole_shards, [whole] = pools([Part()])
    whole.keys[0][:] = torch.arange(whole.keys[0].numel(), dtype=torch.float32).view(whole.keys[0].shape)
    both.write([2], WholeBlocks(MANIFEST, whole_shards, [whole]).read([2]))
    slots = slice(2 * 4, 3 * 4)
    assert torch.equal(made[0].keys[0][slots], whole.keys[0][slots, :2])
    assert torch.equal(made[1].keys[0][slots], whole.keys[0][slots, 2:])


def test_what_is_written_to_a_device_is_not_in_its_copy_on_the_host() -> None:
    """That is for peers, and only what is published is there."""
    shards, [pool] = pools([Part()], on_host=False)
    host = pool.mirror("e")
    device = WholeBlocks(MANIFEST, shards, [pool])
    rows = np.random.default_rng(1).integers(1, 256, (2, device.block_bytes), dtype=np.uint8)
    device.write([3, 0], rows)
    assert (device.read([3, 0]) == rows).all()
    assert not host.bytes.any()
    pool.publish([0])
    assert np.count_nonzero(host.bytes) == device.block_bytes


def test_a_gpu_without_room_for_a_copy_fails_as_a_tier_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = blocks([Part()], on_host=False)

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "tensor", no_room)
    with pytest.raises(TierFailed, match="no room for a copy: CUDA out of memory"):
        made.read([1])
    with pytest.raises(TierFailed, match="no room"):
        made.write([1], np.zeros((1, made.block_bytes), np.uint8))
