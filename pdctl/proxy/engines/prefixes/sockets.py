"""ZeroMQ sockets to the KV events of one engine. Imported only where an engine publishes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import closing

import zmq
import zmq.asyncio

from pdctl.kv_events import END, Endpoints
from pdctl.proxy.engines.prefixes.batches import NotEvents

# Batches that wait to be read; an engine drops what comes beyond, and they are asked for again.
_LIVE_WAITING, _REPLAYED_WAITING = 4096, 16_384
_MOST_BYTES = 64 * 2**20
_NUMBER_BYTES = 8


class EventSockets:
    """Subscribed from the beginning. Raises NotEvents if the addresses cannot be used."""

    def __init__(self, at: Endpoints) -> None:
        self._at = at
        self._context = zmq.asyncio.Context.instance()
        self._live = self._connected(zmq.SUB, at.events, _LIVE_WAITING)
        self._live.subscribe(b"")
        # ZeroMQ connects again by itself, which numbers alone would not always tell.
        self._ends = self._live.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def close(self) -> None:
        """Close all sockets."""
        self._live.disable_monitor()
        self._ends.close(linger=0)
        self._live.close(linger=0)

    async def live(self, timeout_s: float) -> tuple[int, bytes] | None:
        """The next batch and its number; None if there is none in time. Raises NotEvents, also if the connection was
        lost: then the engine may be another start of it."""
        frames: list[bytes] | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                frames = await self._live.recv_multipart()
        if self._was_cut():
            raise NotEvents("the connection to its KV events was lost")
        return None if frames is None else _parted(frames)

    def _was_cut(self) -> bool:
        events = self._ends.get(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)

    async def replay(self, first: int, timeout_s: float) -> AsyncGenerator[tuple[int, bytes], None]:
        """The batches from `first` on that the engine still has. Raises NotEvents, also if the next one does not come
        in time."""
        # Each request has a socket of its own: a late answer to another one is never read.
        with closing(self._connected(zmq.DEALER, self._at.replay, _REPLAYED_WAITING)) as asked:
            await asked.send_multipart((b"", first.to_bytes(_NUMBER_BYTES, "big")))
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        frames = await asked.recv_multipart()
                except TimeoutError:
                    raise NotEvents(f"no answer to a request for batch {first} within {timeout_s:g} s") from None
                if len(frames) >= 2 and frames[-2] == END:
                    return
                yield _parted(frames)

    def _connected(self, kind: int, address: str, waiting: int) -> zmq.asyncio.Socket:
        found = self._context.socket(kind)
        found.set_hwm(waiting)
        found.setsockopt(zmq.LINGER, 0)
        found.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        try:
            found.connect(address)
        except zmq.ZMQError as failure:
            found.close()
            raise NotEvents(f"{address} cannot be used: {failure}") from failure
        return found


def _parted(frames: list[bytes]) -> tuple[int, bytes]:
    """The number and the payload. Versions of vLLM differ in what comes before."""
    if len(frames) < 2 or len(frames[-2]) != _NUMBER_BYTES:
        raise NotEvents("its events have another form than vLLM's")
    return int.from_bytes(frames[-2], "big"), frames[-1]
