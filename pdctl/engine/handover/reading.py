"""Reads a sequence's KV from all shards of a peer into all shards of this engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from pdctl.engine.cache.columns import Columns, Slots
from pdctl.engine.cache.layout import Half, Span, block_bytes, check, rows, slot, spans
from pdctl.engine.cache.memory import Bytes, Memory, NoMemory
from pdctl.engine.cache.shards import Route, Shard, local, routes, whole_rows
from pdctl.engine.ipc.messages import Pull
from pdctl.engine.transfer import TransferError, TransferUncertain, Transport
from pdctl.wire import Manifest, PoolEndpoint

# Staging areas at most: each read takes one, and keeps it while bytes may still arrive there.
_MOST_AREAS = 8
# A read waits for an area as long as others may take, at most.
_AREA_S = 30.0


class Staging(NamedTuple):
    """Memory that rows of a peer are read into, and the transport that writes there."""

    memory: Memory
    transport: Transport


class _Areas:
    """The staging areas of all transports, opened when they are needed."""

    def __init__(self, stage: Callable[[str], Staging]) -> None:
        self._stage = stage
        self._changed = threading.Condition()
        self._free: dict[str, list[Staging]] = {}
        self._all: dict[str, list[Staging]] = {}

    def take(self, name: str) -> Staging:
        """An area that nothing writes to. Raises TransferError, NoMemory."""
        with self._changed:
            free, opened = self._free.setdefault(name, []), self._all.setdefault(name, [])
            self._changed.wait_for(lambda: free or len(opened) < _MOST_AREAS, _AREA_S)
            if free:
                return free.pop()
            if len(opened) >= _MOST_AREAS:
                raise TransferError(f"all {_MOST_AREAS} staging areas are in use")
            made = self._stage(name)
            opened.append(made)
            return made

    def give_back(self, name: str, area: Staging) -> None:
        """Nothing writes to it any more."""
        with self._changed:
            self._free[name].append(area)
            # Waiters want areas of different transports.
            self._changed.notify_all()

    def transports(self) -> list[Transport]:
        """Of all areas."""
        with self._changed:
            return [area.transport for opened in self._all.values() for area in opened]


class Target(Protocol):
    """A pool that rows are copied into."""

    def fill(self, read: Bytes, slots: Slots, columns: Sequence[Columns]) -> None:
        """Copy columns of what was read into these slots, and wait until they are there. Raises NoMemory."""
        ...


@dataclass(frozen=True, slots=True)
class OurShard:
    """One of this engine's pools. `transports`: by name; those in `direct` read into the pool, others only serve it,
    from a copy in host memory."""

    shard: Shard
    pool: Target
    transports: dict[str, Transport]
    direct: frozenset[str]


@dataclass(frozen=True, slots=True)
class Way:
    """How a peer is read: by transport `name`, from the `addresses` of its `shards`, in `routes`."""

    name: str
    addresses: list[str]
    shards: list[Shard]
    routes: list[Route]


def way(name: str, addresses: list[str], ours: Sequence[OurShard], theirs: Sequence[PoolEndpoint]) -> Way:
    """The way to read a peer. Raises ValueError if its shards do not have what ours need."""
    shards = [_shard_of(other) for other in theirs]
    manifest = shards[0].manifest
    if any(other[:2] != shards[0][:2] for other in shards):
        raise ValueError("the peer's shards do not fit together")
    found = routes(manifest, [other.part for other in shards], [one.shard.part for one in ours])
    return Way(name, addresses, shards, [_reachable(name, route, ours) for route in found])


def _reachable(name: str, route: Route, ours: Sequence[OurShard]) -> Route:
    """The same route through a staging area for those of our shards that the transport cannot write to."""
    indirect = [shard for shard in route.same if name not in ours[shard].direct]
    whole = [piece for shard in indirect for piece in whole_rows(shard, ours[shard].shard)]
    return Route(route.source, [shard for shard in route.same if shard not in indirect], route.pieces + whole)


class ShardReader:
    """`stage`: opens a staging area for a transport. Used by several threads."""

    def __init__(self, ours: Sequence[OurShard], stage: Callable[[str], Staging]) -> None:
        self.ours = ours
        self._areas = _Areas(stage)

    def connect(self, found: Way, theirs: Sequence[PoolEndpoint]) -> None:
        """Prepare to read. Raises TransferError, NoMemory."""
        for route in found.routes:
            peer = theirs[route.source]
            for shard in route.same:
                self.ours[shard].transports[found.name].connect(found.addresses[route.source], num_bytes(peer))
            if route.pieces:
                area = self._areas.take(found.name)
                try:
                    area.transport.connect(found.addresses[route.source], num_bytes(peer))
                finally:
                    self._areas.give_back(found.name, area)

    def forget(self, found: Way) -> None:
        """Release a peer that has been replaced."""
        for transport in [one for one in self.transports() if one.name == found.name]:
            for address in found.addresses:
                transport.forget(address)

    def read(self, found: Way, pull: Pull, timeout_s: Callable[[int], float]) -> int:
        """Read from one of the peer's shards after the other; returns bytes moved. `timeout_s`: for so many bytes.

        Raises ValueError for a pull that does not fit, TransferError, and TransferUncertain: then only the last read
        may still write."""
        if [_shard_of(peer) for peer in pull.endpoint.shards] != found.shards:
            raise ValueError("the peer's KV has another shape than when it was linked")
        moved = 0
        for route in found.routes:
            peer = pull.endpoint.shards[route.source]
            source = found.shards[route.source].half(pull.source_blocks)
            address = found.addresses[route.source]
            for index in route.same:
                target = self.ours[index]
                todo = spans(source, target.shard.half(pull.target_blocks), pull.first, pull.count)
                seconds = timeout_s(sum(span.length for span in todo))
                moved += target.transports[found.name].read(address, num_bytes(peer), todo, seconds)
            if route.pieces:
                moved += self._read_staged(found, route, source, pull, timeout_s)
        return moved

    def transports(self) -> list[Transport]:
        """All open transports."""
        ours = [transport for one in self.ours for transport in one.transports.values()]
        return [*self._areas.transports(), *ours]

    def close(self) -> None:
        """Close all transports."""
        for transport in self.transports():
            transport.close()

    def _read_staged(
        self, found: Way, route: Route, source: Half, pull: Pull, timeout_s: Callable[[int], float]
    ) -> int:
        """Read whole rows of one of the peer's shards, as many as a staging area holds, and copy what is needed."""
        check(source, "the peer's", pull.first, pull.count)
        targets = {piece.shard: self.ours[piece.shard].shard.half(pull.target_blocks) for piece in route.pieces}
        for target in targets.values():
            check(target, "our", pull.first, pull.count)
        address, peer = found.addresses[route.source], pull.endpoint.shards[route.source]
        area, moved = self._areas.take(found.name), 0
        try:
            for first, count in _portions(area, source, pull):
                todo = _staging_spans(source, first, count)
                seconds = timeout_s(sum(span.length for span in todo))
                moved += area.transport.read(address, num_bytes(peer), todo, seconds)
                self._spread(area, route, source, targets, first, count)
        except TransferUncertain as failure:
            raise self._late(found.name, area, failure) from failure
        except (TransferError, NoMemory, ValueError):
            self._areas.give_back(found.name, area)
            raise
        self._areas.give_back(found.name, area)
        return moved

    def _spread(
        self, area: Staging, route: Route, source: Half, targets: dict[int, Half], first: int, count: int
    ) -> None:
        """Copy the pieces of `count` rows of each plane from the staging area to our pools."""
        starts = list(accumulate((count * size for _, size in rows(source)), initial=0))
        for shard, half in targets.items():
            columns = [
                Columns(starts[piece.source_plane], starts[piece.source_plane + 1], *piece[2:])
                for piece in route.pieces
                if piece.shard == shard
            ]
            self.ours[shard].pool.fill(area.memory.bytes[: starts[-1]], _slots(half, first, count), columns)

    def _late(self, name: str, area: Staging, failure: TransferUncertain) -> TransferUncertain:
        """The area is used again when nothing is written to it any more."""

        def settled() -> bool:
            if not failure.settled():
                return False
            self._areas.give_back(name, area)
            return True

        return TransferUncertain(str(failure), settled)


def _portions(area: Staging, source: Half, pull: Pull) -> Iterator[tuple[int, int]]:
    """(first token, number of tokens) of what the area holds at once."""
    most = area.memory.num_bytes // sum(size for _, size in rows(source))
    if not most:
        raise ValueError("a token's KV is larger than the staging area")
    for first in range(pull.first, pull.first + pull.count, most):
        yield first, min(most, pull.first + pull.count - first)


def _shard_of(pool: PoolEndpoint) -> Shard:
    return Shard(pool.manifest, pool.num_blocks, pool.part)


def num_bytes(pool: PoolEndpoint) -> int:
    """The size of a peer's pool."""
    return block_bytes(local(pool.manifest, pool.part)) * pool.num_blocks


def whole_block_bytes(manifest: Manifest, shards: Sequence[Shard]) -> int:
    """Bytes of one block in all of an engine's pools together."""
    return sum(block_bytes(local(manifest, shard.part)) for shard in shards)


def _staging_spans(source: Half, first: int, count: int) -> list[Span]:
    """Rows of tokens `first` to `first + count`, plane after plane, token after token."""
    runs: list[tuple[int, int, int]] = []  # slot, token, number of tokens
    token = first
    while token < first + count:
        at, left = slot(source, token)
        tokens = min(left, first + count - token)
        if runs and runs[-1][0] + runs[-1][2] == at:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + tokens)
        else:
            runs.append((at, token, tokens))
        token += tokens
    found, target = [], 0
    for start, size in rows(source):
        found += [Span(start + at * size, target + (token - first) * size, tokens * size) for at, token, tokens in runs]
        target += count * size
    return found


def _slots(half: Half, first: int, count: int) -> Slots:
    tokens = np.arange(first, first + count)
    size = half.manifest.block_size
    return np.array(half.block_ids)[tokens // size] * size + tokens % size
