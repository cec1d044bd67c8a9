"""Which heads a device has, and routes between engines whose devices share them differently."""

from __future__ import annotations

import pytest

from pdctl.engine.cache.shards import Piece, heads, local, routes
from pdctl.wire import LayerShape, Manifest, Part

MANIFEST = Manifest("m", "float32", 4, [LayerShape(4, 3, 5)])


def parts(size: int) -> list[Part]:
    return [Part(rank, size) for rank in range(size)]


@pytest.mark.parametrize(
    ("kv_heads", "size", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_heads_are_shared_evenly_or_had_by_several(kv_heads: int, size: int, expected: list[list[int]]) -> None:
    assert [list(heads(kv_heads, part)) for part in parts(size)] == expected


def test_a_pool_has_the_heads_of_its_part() -> None:
    assert [shape.kv_heads for shape in local(MANIFEST, Part(1, 2)).layers] == [2]
    assert local(MANIFEST, Part()) == MANIFEST


def test_equal_widths_need_no_staging() -> None:
    for size in (1, 2, 4, 8):
        found = routes(MANIFEST, parts(size), parts(size))
        assert [(route.source, route.same, route.pieces) for route in found] == [(n, [n], []) for n in range(size)]


def test_two_devices_read_halves_of_the_rows_of_one() -> None:
    [route] = routes(MANIFEST, parts(1), parts(2))
    assert (route.source, route.same) == (0, [])
    assert route.pieces == [
        Piece(0, 0, 0, 0, 0, 24), Piece(0, 1, 1, 0, 0, 40), Piece(1, 0, 0, 24, 0, 24), Piece(1, 1, 1, 40, 0, 40),
    ]  # fmt: skip


def test_one_device_reads_its_rows_from_two() -> None:
    first, second = routes(MANIFEST, parts(2), parts(1))
    assert first.pieces == [Piece(0, 0, 0, 0, 0, 24), Piece(0, 1, 1, 0, 0, 40)]
    assert second.pieces == [Piece(0, 0, 0, 0, 24, 24), Piece(0, 1, 1, 0, 40, 40)]


def test_a_head_that_several_have_is_read_once() -> None:
    single = Manifest("m", "float32", 4, [LayerShape(1, 3, 5)])
    assert [(r.source, r.same) for r in routes(single, parts(2), parts(1))] == [(0, [0])]
    assert [(r.source, r.same) for r in routes(single, parts(1), parts(2))] == [(0, [0, 1])]


def test_a_peer_without_some_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the peer's 1 shards has KV head 2"):
        routes(MANIFEST, [Part(0, 2)], parts(1))


DEEP = Manifest("m", "float32", 4, [LayerShape(2, 3, 5), LayerShape(1, 2, 2), LayerShape(2, 1, 1)])


def test_a_stage_has_its_layers() -> None:
    assert local(DEEP, Part(0, 2, 1, 2)).layers == [LayerShape(1, 2, 2), LayerShape(1, 1, 1)]
    assert local(DEEP, Part(0, 1, 0, 3)) == DEEP


def test_stages_read_their_planes_of_one() -> None:
    [route] = routes(DEEP, parts(1), [Part(0, 1, 0, 1), Part(0, 1, 1, 2)])
    assert (route.source, route.same) == (0, [])
    assert [(piece.shard, piece.source_plane, piece.target_plane) for piece in route.pieces] == [
        (0, 0, 0), (0, 1, 1), (1, 2, 0), (1, 3, 1), (1, 4, 2), (1, 5, 3),
    ]  # fmt: skip


def test_equal_stages_need_no_staging() -> None:
    stages = [Part(rank, 2, *place) for place in ((0, 1), (1, 2)) for rank in range(2)]
    assert [(r.source, r.same, r.pieces) for r in routes(DEEP, stages, stages)] == [(n, [n], []) for n in range(4)]


def test_a_peer_without_some_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the peer's 1 shards has KV head 0 of layer 1"):
        routes(DEEP, [Part(0, 1, 0, 1)], parts(1))


@pytest.mark.parametrize("place", [(1, 0), (-1, 1), (0, -1), (5000, 1), (0, 5000)])
def test_layers_that_cannot_be_are_refused(place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="layers"):
        Part(0, 1, *place)


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), (0, 65)])
def test_parts_that_cannot_be_are_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="there is no rank"):
        Part(rank, ranks)
