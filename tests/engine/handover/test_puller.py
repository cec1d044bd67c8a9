from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest

from pdctl.engine.cache.columns import Columns, Slots
from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Bytes
from pdctl.engine.cache.shards import Shard
from pdctl.engine.handover.puller import OurSide, Puller
from pdctl.engine.handover.reading import OurShard, ShardReader, Staging
from pdctl.engine.ipc.messages import Connect, Linked, Pull, Pulled
from pdctl.engine.transfer import TransferError, TransferUncertain
from pdctl.wire import KvEndpoint, LayerShape, Manifest, Part, PoolEndpoint, Served

MANIFEST = Manifest("m", "float32", 4, [LayerShape(1, 2, 2)])


class Wire:
    """A scripted transport: reads from "stuck" wait, reads from "late" are given up, others succeed."""

    name = protocol = "shm"
    address = fallback = ""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.landed = threading.Event()
        self.closed = False

    def connect(self, address: str, peer_bytes: int) -> None:
        if address == "dead":
            raise TransferError("nobody there")

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        if address == "stuck":
            assert self.go.wait(10)
        if address == "late":
            raise TransferUncertain("too late", self.landed.is_set)
        return sum(span.length for span in spans)

    def forget(self, address: str) -> None: ...

    def prune(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class NoPool:
    def fill(self, read: Bytes, slots: Slots, columns: Sequence[Columns]) -> None:
        raise AssertionError("equal widths need no staging area")


_Said = TypeVar("_Said", Pulled, Linked, str)


class Rig:
    def __init__(self) -> None:
        self.wire = Wire()
        self.said: queue.Queue[Pulled | Linked | str] = queue.Queue()
        ours = OurShard(Shard(MANIFEST, 8, Part()), NoPool(), {"shm": self.wire}, frozenset({"shm"}))
        reader = ShardReader([ours], no_staging)
        side = OurSide(MANIFEST, "here", "auto", 1.0)
        self.puller = Puller(side, reader, self.said.put, self.said.put)

    def pull(self, request: str, peer: str, source_blocks: Sequence[int] = (1,), count: int = 4) -> None:
        self.puller.submit(Pull(request, peer, "e", endpoint(peer), list(source_blocks), [2], 0, count))

    def next(self, kind: type[_Said]) -> _Said:
        while True:
            found = self.said.get(timeout=300)
            if isinstance(found, kind):
                return found


def no_staging(name: str) -> Staging:
    raise AssertionError("equal widths need none")


def endpoint(address: str, manifest: Manifest = MANIFEST) -> KvEndpoint:
    return KvEndpoint((PoolEndpoint("here", [Served("shm", address, "shm")], 8, manifest),))


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.wire.go.set()
    made.puller.close()
    assert made.wire.closed


def test_a_pull_moves_exactly_its_tokens(rig: Rig) -> None:
    rig.pull("r", "good", count=3)
    assert rig.next(Linked).link.transport == "shm"
    done = rig.next(Pulled)
    assert (done.request_id, done.error, done.bytes) == ("r", "", 3 * 2 * 2 * 4)


def test_a_stuck_peer_delays_nobody_else(rig: Rig) -> None:
    for number in range(5):
        rig.pull(f"s{number}", "stuck")
    rig.pull("r", "good")
    assert rig.next(Pulled).request_id == "r"
    rig.wire.go.set()
    assert {rig.next(Pulled).request_id for _ in range(5)} == {f"s{n}" for n in range(5)}


def test_an_uncertain_read_is_told_first_and_settled_when_it_is_over(rig: Rig) -> None:
    rig.pull("r", "late")
    done = rig.next(Pulled)
    assert (done.uncertain, done.error) == (True, "too late")
    assert rig.said.empty(), "not before it has landed"
    rig.wire.landed.set()
    assert rig.next(str) == "r"


def test_a_pull_that_waits_can_be_cancelled(rig: Rig) -> None:
    for name in ("a", "waits"):
        rig.pull(name, "stuck")
    rig.puller.cancel("waits")
    cancelled = rig.next(Pulled)
    assert (cancelled.request_id, cancelled.error) == ("waits", "the request is gone")
    rig.puller.cancel("a")  # running: it ends by itself
    rig.wire.go.set()
    assert rig.next(Pulled).request_id == "a"


def test_links_tell_why_they_cannot_be_made(rig: Rig) -> None:
    other = Manifest("another model", "float32", 4, MANIFEST.layers)
    rig.puller.submit(Connect("dead", "e", endpoint("dead")))
    rig.puller.submit(Connect("odd", "e", endpoint("odd", other)))
    apart = [
        PoolEndpoint("here", [Served(name, "a", name)], 8, MANIFEST, Part(rank, 2))
        for rank, name in enumerate(("shm", "mooncake"))
    ]
    rig.puller.submit(Connect("apart", "e", KvEndpoint(tuple(apart))))
    errors = {said.link.error for said in (rig.next(Linked) for _ in range(3))}
    assert errors == {
        "nobody there", "the models differ: another mode there, m here",
        "no transport is open on both sides: here shm; there mooncake",
    }  # fmt: skip


def test_a_peer_with_several_devices_is_read_from_each(rig: Rig) -> None:
    shards = tuple(
        PoolEndpoint("here", [Served("shm", address, "shm")], 8, MANIFEST, Part(rank, 2))
        for rank, address in enumerate(("good", "late"))
    )
    pull = Pull("r", "both", "e", KvEndpoint(shards), [1], [2], 0, 4)
    # Its one KV head is on both devices: only the first is read.
    rig.puller.submit(pull)
    assert rig.next(Pulled).bytes == 4 * 2 * 2 * 4


def test_a_pull_outside_the_pools_is_refused(rig: Rig) -> None:
    rig.pull("r", "good", source_blocks=[8])
    assert "outside" in rig.next(Pulled).error
    rig.pull("q", "good", count=5)
    assert "more than 1 blocks" in rig.next(Pulled).error
