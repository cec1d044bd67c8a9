"""An engine's cache of KV blocks and what it publishes of it, as vLLM 0.32 and SGLang 0.5.23 do: no model, no pdctl.

Hashes are opaque, and other ones after each start. tests/vllm compares the form with vLLM's own classes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import deque
from typing import Any

import msgspec
import zmq
import zmq.asyncio

END = (-1).to_bytes(8, "big", signed=True)
Json = dict[str, Any]


def stored(hashes: list[bytes], parent: bytes | None, token_ids: list[int], size: int, **more: object) -> Json:
    head = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": token_ids}
    return {**head, "block_size": size, "lora_id": None, "medium": "GPU", "lora_name": None, **more}


def removed(hashes: list[bytes], **more: object) -> Json:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **more}


CLEARED: Json = {"type": "AllBlocksCleared"}


class Cache:
    """Blocks that can be found. The methods return the events that tell of the change."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: dict[bytes, tuple[int, ...]] = {}
        self._seed = os.urandom(8)

    def hash_of(self, token_ids: tuple[int, ...]) -> bytes:
        return hashlib.sha256(self._seed + repr(token_ids).encode()).digest()

    def found(self, token_ids: list[int]) -> int:
        """How many tokens of a prompt are there."""
        chain = self.chain(token_ids)
        return self.size * next((n for n, block in enumerate(chain) if block not in self.blocks), len(chain))

    def chain(self, token_ids: list[int]) -> list[bytes]:
        ends = range(self.size, len(token_ids) + 1, self.size)
        return [self.hash_of(tuple(token_ids[:end])) for end in ends]

    def compute(self, token_ids: list[int]) -> list[Json]:
        """Keep the whole blocks of a prompt."""
        have, chain = self.found(token_ids), self.chain(token_ids)
        new = chain[have // self.size :]
        for number, block in enumerate(new, have // self.size + 1):
            self.blocks[block] = tuple(token_ids[: number * self.size])
        parent = chain[have // self.size - 1] if have else None
        return [stored(new, parent, token_ids[have : len(chain) * self.size], self.size)] if new else []

    def drop(self, block: bytes) -> list[Json]:
        """Its place was needed."""
        del self.blocks[block]
        return [removed([block])]

    def clear(self) -> list[Json]:
        self.blocks.clear()
        return [CLEARED]


class Publisher:
    """PUB and ROUTER sockets (an XPUB is a PUB that tells of subscriptions).

    `lost`: that many of the next batches are not sent; `holes`: numbers that are left out of the next replay, or
    `always`; `silent`: replays are not answered."""

    def __init__(self, events: str, replay: str, kept: int = 10_000) -> None:
        self.lost, self.replays = 0, 0
        self.holes, self.always, self.silent = set[int](), False, False
        self._context = zmq.asyncio.Context()
        self._pub: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.XPUB)
        self._router = self._context.socket(zmq.ROUTER)
        self._pub.bind(events)
        self._router.bind(replay)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._next = 0

    def publish(self, events: list[Json]) -> None:
        """A batch, as `[ts, events, rank]`. Like vLLM's, none without events."""
        if not events:
            return
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        number, self._next = self._next, self._next + 1
        self._kept.append((number, payload))
        if self.lost:
            self.lost -= 1
        else:
            self.send(number, payload)

    async def subscribed(self) -> None:
        """Return when somebody has subscribed."""
        while not self._pub.poll(0):
            await asyncio.sleep(0)
        self._pub.recv()

    def send(self, number: int, payload: bytes) -> None:
        self._pub.send_multipart((b"", number.to_bytes(8, "big"), payload))

    def again(self, number: int) -> None:
        """Send a batch a second time."""
        self.send(*next(batch for batch in self._kept if batch[0] == number))

    async def replay_forever(self) -> None:
        while True:
            client, _, first = await self._router.recv_multipart()
            self.replays += 1
            if self.silent:
                continue
            holes = self.holes
            if not self.always:
                self.holes = set()
            for number, payload in list(self._kept):
                if number >= int.from_bytes(first, "big") and number not in holes:
                    await self._router.send_multipart((client, b"", b"", number.to_bytes(8, "big"), payload))
            await self._router.send_multipart((client, b"", b"", END, b""))

    def close(self) -> None:
        for each in (self._pub, self._router):
            each.close(linger=0)
        self._context.term()


async def serve(publisher: Publisher) -> None:
    """Answer replays until cancelled."""
    try:
        await publisher.replay_forever()
    except asyncio.CancelledError:
        publisher.close()
        raise
