"""KV events over real sockets, to a subscriber that knows only vLLM's schema."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from pdctl.engine.front import kv_events
from pdctl.engine.front.kv_events import KvEvents, short
from pdctl.engine.ipc.messages import KvChange, KvRemoved, KvStored
from pdctl.engine.options import parse
from tests.service import free_port

WAIT_S = 20.0


# The classes of vllm.distributed.kv_events 0.32, without the fields that have defaults. tests/vllm uses vLLM's own.
class BlockStored(msgspec.Struct, tag=True):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[bytes | int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class KVEventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


DECODER = msgspec.msgpack.Decoder(KVEventBatch)


@dataclass
class Reader:
    """What a router keeps: the blocks by hash, and the number of the next batch."""

    next: int = 0
    blocks: dict[bytes | int, tuple[bytes | int | None, list[int]]] = field(default_factory=dict)

    def read(self, frames: list[bytes]) -> None:
        _, sequence, payload = frames
        number = int.from_bytes(sequence, "big")
        assert number == self.next, "a gap"
        self.next += 1
        for event in DECODER.decode(payload).events:
            match event:
                case AllBlocksCleared():
                    self.blocks.clear()
                case BlockRemoved():
                    for found in event.block_hashes:
                        del self.blocks[found]
                case BlockStored():
                    self._store(event)

    def _store(self, event: BlockStored) -> None:
        before, size = event.parent_block_hash, event.block_size
        assert len(event.token_ids) in (0, size * len(event.block_hashes))
        for number, found in enumerate(event.block_hashes):
            self.blocks[found] = before, event.token_ids[number * size : (number + 1) * size]
            before = found

    async def catch_up(self, replay: zmq.asyncio.Socket) -> None:
        """Ask for what was missed."""
        await replay.send_multipart((b"", self.next.to_bytes(8, "big")))
        while True:
            _, topic, sequence, payload = await asyncio.wait_for(replay.recv_multipart(), WAIT_S)
            if int.from_bytes(sequence, "big", signed=True) == -1:
                assert payload == b""
                return
            if int.from_bytes(sequence, "big") >= self.next:
                self.read([topic, sequence, payload])


@dataclass
class Rig:
    events: KvEvents
    subscriber: zmq.asyncio.Socket
    replay: zmq.asyncio.Socket

    def same(self, reader: Reader) -> None:
        """The reader has what a snapshot says."""
        found = self.events.snapshot()
        assert found.sequence == reader.next - 1
        blocks = {event.block_hashes[0]: (event.parent_block_hash, event.token_ids) for event in found.events}
        assert blocks == reader.blocks


@asynccontextmanager
async def rig() -> Any:
    ports = free_port(), free_port()
    words = ["--name", "e", "--model", "/m", "--port", "1", "--run-dir", "/r", "--block-size", "2", "--kv-events",
             "tokens", "--kv-events-port", str(ports[0]), "--kv-replay-port", str(ports[1])]  # fmt: skip
    events, context = KvEvents(parse(words)), zmq.asyncio.Context()
    subscriber, replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    subscriber.subscribe(b"")
    subscriber.connect(f"tcp://127.0.0.1:{ports[0]}")
    replay.connect(f"tcp://127.0.0.1:{ports[1]}")
    answering = asyncio.create_task(events.replay_forever())
    try:
        yield Rig(events, subscriber, replay)
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        events.close()
        for each in (subscriber, replay):
            each.close(linger=0)
        context.term()


def name(number: int) -> bytes:
    return number.to_bytes(8, "big") + b"rest of a digest"


def chain(first: int, count: int, parent: bytes | None = None) -> KvStored:
    names = [name(number) for number in range(first, first + count)]
    return KvStored(names, parent, list(range(2 * first, 2 * (first + count))))


async def connected(rig: Rig, reader: Reader) -> None:
    """Publish until the subscription has arrived; then the reader has everything."""
    while True:
        rig.events.take([])
        if await rig.subscriber.poll(100):
            frames = await rig.subscriber.recv_multipart()
            break
    await reader.catch_up(rig.replay)
    assert int.from_bytes(frames[1], "big") < reader.next
    while await rig.subscriber.poll(0):
        await rig.subscriber.recv_multipart()


CHANGES: list[list[KvChange]] = [
    [chain(1, 3)],
    [chain(4, 1, name(3)), KvRemoved([name(3), name(2)])],
    [chain(10, 2, None), chain(2, 1, name(1))],
]


def test_a_subscriber_follows() -> None:
    async def run() -> None:
        async with rig() as found:
            reader = Reader()
            await connected(found, reader)
            for changes in CHANGES:
                found.events.take(changes)
                reader.read(await asyncio.wait_for(found.subscriber.recv_multipart(), WAIT_S))
                found.same(reader)
            assert reader.blocks == {
                1: (None, [2, 3]), 4: (3, [8, 9]), 10: (None, [20, 21]), 11: (10, [22, 23]), 2: (1, [4, 5]),
            }  # fmt: skip

    asyncio.run(run())


def test_what_was_missed_is_replayed() -> None:
    async def run() -> None:
        async with rig() as found:
            for changes in CHANGES:
                found.events.take(changes)
            reader = Reader()
            await reader.catch_up(found.replay)
            found.same(reader)
            found.events.take([KvRemoved([name(10)])])
            await reader.catch_up(found.replay)
            found.same(reader)
            assert reader.next == 5

    asyncio.run(run())


def test_after_a_gap_that_is_not_kept_a_snapshot_is_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_KEPT", 3)

    async def run() -> None:
        async with rig() as found:
            for number in range(20):
                found.events.take([chain(100 + number, 1)])
            reader = Reader()
            with pytest.raises(AssertionError, match="a gap"):
                await reader.catch_up(found.replay)
            taken = found.events.snapshot()
            reader = Reader(taken.sequence + 1)
            for event in taken.events:
                reader._store(msgspec.convert(msgspec.to_builtins(event), BlockStored))
            found.events.take([KvRemoved([name(100)]), chain(1, 2)])
            async with asyncio.timeout(WAIT_S):
                while await found.replay.poll(100):
                    await found.replay.recv_multipart()  # the end of the first answer
            await reader.catch_up(found.replay)
            found.same(reader)

    asyncio.run(run())


def test_a_subscriber_that_does_not_read_slows_nobody() -> None:
    async def run() -> None:
        async with rig() as found:
            reader = Reader()
            await connected(found, reader)
            found.subscriber.setsockopt(zmq.RCVHWM, 1)
            big = [chain(1000 * number, 500) for number in range(20)]
            for number in range(3000):  # some 100 MB: more than sockets and kernel take
                found.events.take([KvRemoved(big[number % 20].names), big[number % 20]])
            found.events.take([chain(7, 1)])
            last = found.events.snapshot().sequence
            seen = []
            while await found.subscriber.poll(500):
                seen.append(int.from_bytes((await found.subscriber.recv_multipart())[1], "big"))
            assert seen == sorted(seen)
            assert len(seen) < last - reader.next, "all of it fitted: the test shows nothing"

    asyncio.run(run())


def test_a_malformed_request_for_a_replay_is_ignored() -> None:
    async def run() -> None:
        async with rig() as found:
            for frames in ((b"",), (b"", b"x"), (b"", b"way too long"), (b"a", b"b", b"c")):
                await found.replay.send_multipart(frames)
            reader = Reader()
            await reader.catch_up(found.replay)
            assert reader.next == 1

    asyncio.run(run())


def test_a_port_in_use_is_an_error() -> None:
    async def run() -> None:
        async with rig() as found:
            with pytest.raises(OSError, match=r"port \d+ on 127.0.0.1 cannot be bound"):
                KvEvents(found.events._options)

    asyncio.run(run())


def test_hashes_are_told_as_vllm_does() -> None:
    assert short(name(5)) == 5
    assert short(b"\xff" * 32) == 2**64 - 1
