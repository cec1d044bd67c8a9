"""Publishes which blocks of KV can be found, in the schema of vLLM's KV events, so that routers can read them.

A subscriber that misses a number asks the replay socket for what is kept; if that is not enough, it takes a snapshot.
Sequence numbers begin at 0 with each start of the engine, and the first event says that all earlier blocks are gone.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import zmq
import zmq.asyncio

from pdctl.engine.ipc.messages import KvChange, KvRemoved, KvStored
from pdctl.engine.options import EngineOptions
from pdctl.kv_events import END, AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event

_log = logging.getLogger(__name__)

# Batches that can be replayed, and those that are kept for a slow subscriber before it loses some.
_KEPT = 4096
_HIGH_WATER = 1024


class Snapshot(msgspec.Struct, frozen=True):
    """All blocks that can be found after the batch `sequence`, as events that store them."""

    engine: str
    epoch: str
    sequence: int
    block_size: int
    events: list[BlockStored]


class _Block(msgspec.Struct, frozen=True):
    parent: int | None
    tokens: list[int]


class KvIndex:
    """The blocks that can be found, by hash. Pure."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._blocks: dict[int, _Block] = {}

    def apply(self, change: KvChange) -> Event:
        """Take a change; the event that tells of it."""
        hashes = [short(name) for name in change.names]
        if isinstance(change, KvRemoved):
            for found in hashes:
                self._blocks.pop(found, None)
            return BlockRemoved(hashes)
        return self._store(hashes, change)

    def blocks(self) -> list[BlockStored]:
        """An event for each block."""
        return [BlockStored([found], block.parent, block.tokens, self._size) for found, block in self._blocks.items()]

    def _store(self, hashes: list[int], change: KvStored) -> BlockStored:
        first = before = None if change.parent is None else short(change.parent)
        for number, found in enumerate(hashes):
            self._blocks[found] = _Block(before, change.tokens[number * self._size : (number + 1) * self._size])
            before = found
        return BlockStored(hashes, first, change.tokens, self._size)


def short(name: bytes) -> int:
    """A block's name as vLLM tells it by default: 64 bits."""
    return int.from_bytes(name[:8], "big")


class KvEvents:
    """The sockets of one engine. Nothing here waits for a subscriber."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises OSError if a port cannot be bound."""
        self._options = options
        self._index = KvIndex(options.block_size)
        self._next = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=_KEPT)
        self._encode = msgspec.msgpack.Encoder().encode
        self._context = zmq.asyncio.Context()
        self._replay = self._context.socket(zmq.ROUTER)
        # A whole replay fits: it is sent without waiting for its reader.
        self._replay.set_hwm(_KEPT + _HIGH_WATER)
        self._events: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUB)
        self._events.set_hwm(_HIGH_WATER)
        try:
            _bind(self._events, options.host, options.kv_events_port)
            _bind(self._replay, options.host, options.kv_replay_port)
        except OSError:
            self.close()
            raise
        self._publish([AllBlocksCleared()])

    def take(self, changes: Iterable[KvChange]) -> None:
        """Publish changes of the prefix cache."""
        self._publish([self._index.apply(change) for change in changes])

    def snapshot(self) -> Snapshot:
        """All that can be found now."""
        options = self._options
        return Snapshot(options.name, options.epoch, self._next - 1, options.block_size, self._index.blocks())

    async def replay_forever(self) -> None:
        """Answer subscribers that have missed batches: with all that are kept from the wanted number on, and an end
        mark."""
        while True:
            client, *_, wanted = await self._replay.recv_multipart()
            if len(wanted) != 8:
                _log.warning("a subscriber asked for KV events by %d bytes instead of 8", len(wanted))
                continue
            # Big endian: numbers are ordered as their bytes are.
            batches = [batch for batch in self._kept if batch[0] >= wanted]
            for sequence, payload in (*batches, (END, b"")):
                await self._replay.send_multipart((client, b"", b"", sequence, payload))

    def close(self) -> None:
        """Close the sockets."""
        self._events.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()

    def _publish(self, events: list[Event]) -> None:
        sequence = self._next.to_bytes(8, "big")
        payload = self._encode(Batch(time.time(), events))
        self._next += 1
        self._kept.append((sequence, payload))
        # A publisher's socket drops what a slow subscriber has no room for.
        self._events.send_multipart((b"", sequence, payload), zmq.NOBLOCK)


def _bind(bound: zmq.Socket[bytes] | zmq.asyncio.Socket, host: str, port: int) -> None:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(zmq.IPV6, 1)
            bound.bind(f"tcp://[{address[0]}]:{port}")
        else:
            bound.bind(f"tcp://{address[0]}:{port}")
    except zmq.ZMQError as failure:
        raise OSError(f"port {port} on {host} cannot be bound: {failure.strerror}") from failure
