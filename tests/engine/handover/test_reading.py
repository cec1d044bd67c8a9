"""Reading from the shards of one engine into those of another: every byte, whatever the widths and block sizes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.cache import kv_pool
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import Span, block_bytes
from pdctl.engine.cache.memory import Memory, NoMemory
from pdctl.engine.cache.shards import Shard, heads, local
from pdctl.engine.handover import reading as module
from pdctl.engine.handover.reading import OurShard, ShardReader, Staging, Way, way
from pdctl.engine.ipc.messages import Pull
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain
from pdctl.engine.transfer.shm import ShmTransport, open_transport
from pdctl.wire import KvEndpoint, LayerShape, Manifest, Part, PoolEndpoint, Served

BLOCKS = 12
SHAPES = [LayerShape(4, 3, 2), LayerShape(4, 1, 1)]


def manifest(block_size: int, shapes: list[LayerShape] = SHAPES) -> Manifest:
    return Manifest("m", "float32", block_size, shapes)


@dataclass
class Engine:
    """Pools whose bytes tell layer, K or V, head, token and element."""

    manifest: Manifest
    size: int
    blocks: list[int]
    stages: int = 1
    memories: list[Memory] = field(default_factory=list)

    def __post_init__(self) -> None:
        for shard in self.shards:
            self.memories.append(Memory(block_bytes(local(self.manifest, shard.part)) * BLOCKS, "e"))

    @property
    def shards(self) -> list[Shard]:
        layers = len(self.manifest.layers)
        places = [(0, 0)]
        if self.stages > 1:
            cuts = [stage * layers // self.stages for stage in range(self.stages + 1)]
            places = [(first, end - first) for first, end in pairwise(cuts)]
        return [Shard(self.manifest, BLOCKS, Part(rank, self.size, *at)) for at in places for rank in range(self.size)]

    def planes(self, number: int) -> list[np.ndarray]:
        """[slot, head, element] of K and V of each of a shard's layers."""
        found, start = [], 0
        values = self.memories[number].bytes.view(np.float32)
        for shape in local(self.manifest, self.shards[number].part).layers:
            for dim in (shape.key_dim, shape.value_dim):
                count = BLOCKS * self.manifest.block_size * shape.kv_heads * dim
                found.append(values[start : start + count].reshape(-1, shape.kv_heads, dim))
                start += count
        return found

    def slots(self, tokens: range) -> list[int]:
        size = self.manifest.block_size
        return [self.blocks[token // size] * size + token % size for token in tokens]

    def endpoint(self, transports: list[ShmTransport]) -> KvEndpoint:
        return KvEndpoint(
            tuple(
                PoolEndpoint("here", [Served("shm", transport.address, "shm")], BLOCKS, self.manifest, shard.part)
                for shard, transport in zip(self.shards, transports, strict=True)
            )
        )

    def ours(self, on_device: bool = False) -> list[OurShard]:
        """On a "device" (this one is the CPU), what transports write to is a copy of the pools in host memory, in which
        older KV lies."""
        found = []
        for shard, memory in zip(self.shards, self.memories, strict=True):
            pool = KvPool(local(self.manifest, shard.part), BLOCKS, None if on_device else memory, torch.device("cpu"))
            if on_device:
                memory = pool.mirror("e")
                memory.bytes[:] = 7
            direct = frozenset() if on_device else frozenset({"shm"})
            found.append(OurShard(shard, pool, {"shm": open_transport(memory, Settings("e"))}, direct))
        return found


def value(plane: int, head: int, token: int, element: int) -> float:
    return plane * 1e5 + head * 1e4 + token * 10 + element


def fill(engine: Engine, tokens: range) -> None:
    for number, shard in enumerate(engine.shards):
        for plane, rows in enumerate(engine.planes(number), 2 * shard.part.first_layer):
            mine = heads(engine.manifest.layers[plane // 2].kv_heads, shard.part)
            for token, slot in zip(tokens, engine.slots(tokens), strict=True):
                for at, head in enumerate(mine):
                    rows[slot, at] = [value(plane, head, token, element) for element in range(rows.shape[2])]


def stage(num_bytes: int) -> Callable[[str], Staging]:
    def opened(name: str) -> Staging:
        memory = Memory(num_bytes, "staging")
        return Staging(memory, open_transport(memory, Settings("e", serving=False)))

    return opened


def linked(
    source: Engine, target: Engine, staging: int = 1 << 16, on_device: bool = False
) -> tuple[ShardReader, Way, KvEndpoint]:
    endpoint = source.endpoint([open_transport(memory, Settings("e")) for memory in source.memories])
    ours = target.ours(on_device)
    addresses = [shard.served[0].address for shard in endpoint.shards]
    found = way("shm", addresses, ours, endpoint.shards)
    reader = ShardReader(ours, stage(staging))
    reader.connect(found, endpoint.shards)
    return reader, found, endpoint


def pull(endpoint: KvEndpoint, source: Engine, target: Engine, first: int, count: int) -> Pull:
    return Pull("r", "p", "e", endpoint, source.blocks, target.blocks, first, count)


WIDTHS = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3]))


@settings(max_examples=80, deadline=None)
@given(
    st.booleans(), WIDTHS, WIDTHS, st.sampled_from([2, 4, 8]),
    st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(0, 10), st.integers(1, 14), st.randoms(),
)  # fmt: skip
def test_every_width_gets_every_byte_and_no_other(
    on_device: bool,
    there: tuple[int, int],
    here: tuple[int, int],
    size_there: int,
    size_here: int,
    kv_heads: int,
    first: int,
    count: int,
    chance: random.Random,
) -> None:
    """`there`, `here`: ranks of each stage, and stages."""
    shapes = [LayerShape(kv_heads, *dims) for dims in ((2, 2), (1, 1), (3, 1))]
    source = Engine(manifest(size_there, shapes), there[0], chance.sample(range(BLOCKS), BLOCKS), there[1])
    target = Engine(manifest(size_here, shapes), here[0], chance.sample(range(BLOCKS), BLOCKS), here[1])
    expected = Engine(manifest(size_here, shapes), here[0], target.blocks, here[1])
    tokens = range(min(first, 23), min(first + count, 24))
    fill(source, range(24))
    fill(expected, tokens)
    # Few rows at once.
    reader, found, endpoint = linked(source, target, 3 * 4 * kv_heads * 10, on_device)
    moved = reader.read(found, pull(endpoint, source, target, tokens.start, len(tokens)), lambda _: 1.0)
    assert moved >= len(tokens) * 4 * kv_heads * 10
    for ours, wanted in zip(reader.ours, expected.memories, strict=True):
        assert isinstance(ours.pool, KvPool)
        assert (ours.pool.store.numpy() == wanted.bytes).all()
    reader.close()


def test_equal_widths_are_read_into_their_place() -> None:
    source, target = Engine(manifest(4), 2, [0, 1, 2]), Engine(manifest(4), 2, [3, 4, 5])
    _, found, _ = linked(source, target)
    assert all(route.same and not route.pieces for route in found.routes)
    _, found, _ = linked(source, target, on_device=True)
    assert all(route.pieces and not route.same for route in found.routes)


class Late:
    """A transport whose first read is given up and may still write."""

    name = protocol = "shm"
    address = fallback = ""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.closed = False

    def connect(self, address: str, peer_bytes: int) -> None: ...

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        raise TransferUncertain("too late", self.landed.is_set)

    def forget(self, address: str) -> None: ...

    def prune(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_staging_area_that_may_still_be_written_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AREA_S", 0.01)
    source, target = Engine(manifest(4), 2, [0, 1, 2]), Engine(manifest(4), 1, [3, 4, 5])
    fill(source, range(12))
    _, found, endpoint = linked(source, target)
    areas: list[Late] = []

    def stage_late(name: str) -> Staging:
        areas.append(Late())
        return Staging(Memory(1 << 12, "staging"), areas[-1])

    reader = ShardReader(target.ours(), stage_late)
    work = pull(endpoint, source, target, 0, 12)

    def read() -> TransferUncertain:
        with pytest.raises(TransferUncertain) as failure:
            reader.read(found, work, lambda _: 1.0)
        return failure.value

    failures = [read() for _ in range(8)]
    assert len(areas) == 8, "one for each"
    with pytest.raises(TransferError, match="all 8 staging areas are in use"):
        reader.read(found, work, lambda _: 1.0)
    assert not failures[3].settled()
    areas[3].landed.set()
    assert failures[3].settled()
    read()
    assert len(areas) == 8, "the one that has settled was used again"
    reader.close()
    assert all(area.closed for area in areas)


def test_areas_of_one_transport_leave_room_for_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AREA_S", 5.0)
    areas = module._Areas(lambda name: Staging(Memory(1 << 12, name), Late()))
    first = [areas.take("local") for _ in range(module._MOST_AREAS)]
    second = [areas.take("mooncake") for _ in range(module._MOST_AREAS)]
    assert len(areas.transports()) == 2 * module._MOST_AREAS
    waiting = {name: threading.Thread(target=areas.take, args=(name,)) for name in ("local", "mooncake")}
    for thread in waiting.values():
        thread.start()
    # Each one is woken by its own transport's, whoever waits longer.
    areas.give_back("mooncake", second[0])
    waiting["mooncake"].join(4)
    assert not waiting["mooncake"].is_alive()
    areas.give_back("local", first[0])
    waiting["local"].join(4)
    assert not waiting["local"].is_alive()


def test_a_peer_whose_shards_do_not_fit_is_refused() -> None:
    target = Engine(manifest(4), 1, [0])
    shards = [PoolEndpoint("here", [], blocks, manifest(4), Part(rank, 2)) for rank, blocks in ((0, 8), (1, 9))]
    with pytest.raises(ValueError, match="do not fit together"):
        way("shm", ["a", "b"], target.ours(), shards)


def test_a_pull_of_another_shape_than_the_link_is_refused() -> None:
    source, target = Engine(manifest(4), 2, [0, 1, 2]), Engine(manifest(4), 1, [3, 4, 5])
    reader, found, endpoint = linked(source, target)
    with pytest.raises(ValueError, match="another shape"):
        reader.read(found, pull(KvEndpoint(endpoint.shards[:1]), source, target, 0, 4), lambda _: 1.0)
    with pytest.raises(ValueError, match="outside the peer's pool"):
        odd = Engine(manifest(4), 2, [0, BLOCKS])
        reader.read(found, pull(endpoint, odd, target, 0, 4), lambda _: 1.0)


def test_a_gpu_without_room_for_what_came_fails_the_read_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the engine; and the staging area is used again."""
    source, target = Engine(manifest(4), 1, [0, 1, 2]), Engine(manifest(4), 1, [3, 4, 5])
    fill(source, range(12))
    reader, found, endpoint = linked(source, target, on_device=True)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    work = pull(endpoint, source, target, 0, 12)
    with monkeypatch.context() as patch:
        patch.setattr(kv_pool, "fill_device", no_room)
        for _ in range(module._MOST_AREAS + 1):
            with pytest.raises(NoMemory, match="no room for KV that has come: CUDA out of memory"):
                reader.read(found, work, lambda _: 1.0)
    assert reader.read(found, work, lambda _: 1.0)
    assert len(reader._areas.transports()) == 1
    reader.close()
