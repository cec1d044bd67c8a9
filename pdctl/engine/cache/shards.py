"""KV over several devices: which layers and heads each has, and what one engine reads from which of another's devices.

All devices have the same blocks of the same tokens, each of its own layers and heads. Where a device of both engines
has the same, rows are read into their place. Otherwise whole rows of the peer are read into a staging area, and what is
needed is copied from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from pdctl.engine.cache.layout import ITEM_BYTES, Half, rows
from pdctl.wire import Manifest, Part


def heads(kv_heads: int, part: Part) -> range:
    """The heads of a layer that a part has."""
    first = part.rank * kv_heads // part.ranks
    return range(first, max(first + 1, (part.rank + 1) * kv_heads // part.ranks))


def layers(count: int, part: Part) -> range:
    """The layers, of `count`, that a part has."""
    return range(part.first_layer, min(count, part.first_layer + part.layers)) if part.layers else range(count)


def local(manifest: Manifest, part: Part) -> Manifest:
    """What a pool with this part has."""
    shapes = [manifest.layers[layer] for layer in layers(len(manifest.layers), part)]
    own = [msgspec.structs.replace(shape, kv_heads=len(heads(shape.kv_heads, part))) for shape in shapes]
    return msgspec.structs.replace(manifest, layers=own)


class Shard(NamedTuple):
    """A pool of `num_blocks` with a part of the KV that `manifest` describes."""

    manifest: Manifest
    num_blocks: int
    part: Part

    def half(self, block_ids: list[int]) -> Half:
        """A sequence's blocks in this pool, as one side of a transfer."""
        return Half(local(self.manifest, self.part), self.num_blocks, block_ids)


class Piece(NamedTuple):
    """Bytes of each token's row in plane `source_plane` of the peer: from `source`, `length` of them, to `target` in
    the row of plane `target_plane` of our shard `shard`."""

    shard: int
    source_plane: int
    target_plane: int
    source: int
    target: int
    length: int


class Route(NamedTuple):
    """What is read from the peer's shard `source`: whole rows for those of our shards in `same`, and for others
    `pieces` of its rows."""

    source: int
    same: list[int]
    pieces: list[Piece]


def routes(manifest: Manifest, theirs: Sequence[Part], ours: Sequence[Part]) -> list[Route]:
    """The routes that give each of our shards all its layers and heads. Raises ValueError if the peer lacks some."""
    found: dict[int, Route] = {}
    for shard, part in enumerate(ours):
        if (source := _with_the_same(manifest, theirs, part, shard)) is not None:
            _route(found, source).same.append(shard)
            continue
        for source, piece in _pieces(manifest, theirs, part, shard):
            _route(found, source).pieces.append(piece)
    return [found[source] for source in sorted(found)]


def _route(found: dict[int, Route], source: int) -> Route:
    return found.setdefault(source, Route(source, [], []))


def whole_rows(number: int, shard: Shard) -> list[Piece]:
    """The pieces of a peer's shard with the same layers and heads as ours with this number: all of each row."""
    sizes = [size for _, size in rows(shard.half([]))]
    return [Piece(number, plane, plane, 0, 0, size) for plane, size in enumerate(sizes)]


def _with_the_same(manifest: Manifest, theirs: Sequence[Part], part: Part, shard: int) -> int | None:
    """The peer's shard with the same layers and heads, the one with our number if there are several."""
    wanted = _had(manifest, part)
    same = [index for index, other in enumerate(theirs) if _had(manifest, other) == wanted]
    return None if not same else shard if shard in same else same[0]


def _had(manifest: Manifest, part: Part) -> list[tuple[int, range]]:
    """(layer, heads) of a part."""
    own = layers(len(manifest.layers), part)
    return [(layer, heads(manifest.layers[layer].kv_heads, part)) for layer in own]


def _pieces(manifest: Manifest, theirs: Sequence[Part], part: Part, shard: int) -> Iterator[tuple[int, Piece]]:
    """For each plane the heads that are adjacent on both sides, each from the first of the peer's shards that has
    it."""
    item = ITEM_BYTES[manifest.dtype]
    had = [dict(_had(manifest, other)) for other in theirs]
    for plane, (layer, ours) in enumerate(_had(manifest, part)):
        shape = manifest.layers[layer]
        there = [other.get(layer, range(0)) for other in had]
        for source, first, count in _runs(layer, ours, there):
            theirs_at = layer - theirs[source].first_layer
            for half, size in enumerate((shape.key_dim * item, shape.value_dim * item)):
                at, to = (first - there[source].start) * size, (first - ours.start) * size
                yield source, Piece(shard, 2 * theirs_at + half, 2 * plane + half, at, to, count * size)


def _runs(layer: int, ours: range, there: list[range]) -> Iterator[tuple[int, int, int]]:
    """(peer's shard, first head, number of heads)."""
    head = ours.start
    while head < ours.stop:
        source = next((index for index, other in enumerate(there) if head in other), None)
        if source is None:
            raise ValueError(f"none of the peer's {len(there)} shards has KV head {head} of layer {layer}")
        count = min(ours.stop, there[source].stop) - head
        yield source, head, count
        head += count
