"""Calls that release what a request left on an engine, made in the background with one queue per engine."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from pdctl.adapters import Call
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.kv_room import Share

# Limit of waiting releases per engine; for others the leases end at their deadline.
_MAX_WAITING = 1024
_CALL_S = 5.0
_JSON = header_lines({"content-type": "application/json"})


class _Waiting(NamedTuple):
    """`share`: the room of the KV that the call frees."""

    call: Call
    share: Share | None


class Releases:
    """`put` never blocks and works during cancellation. An engine that does not answer delays only its own queue."""

    def __init__(self) -> None:
        self.failed = 0
        self._queues: dict[str, asyncio.Queue[_Waiting]] = {}
        self._new: asyncio.Queue[tuple[Engine, asyncio.Queue[_Waiting]]] = asyncio.Queue()

    def put(self, engine: Engine, call: Call, share: Share | None = None) -> None:
        """Queue a call. If the queue is full, the engine is dead and its leases end at their deadline.

        With a `share`, the call is made only in the life of the engine that it is for.
        """
        queue = self._queues.get(engine.name)
        if queue is None:
            queue = self._queues[engine.name] = asyncio.Queue(_MAX_WAITING)
            self._new.put_nowait((engine, queue))
        if queue.full():
            self.failed += 1
            _ended(engine, share, done=False)
        else:
            queue.put_nowait(_Waiting(call, share))

    async def run_forever(self) -> None:
        """Make the calls."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                engine, queue = await self._new.get()
                tasks.create_task(self._serve(engine, queue))

    async def _serve(self, engine: Engine, queue: asyncio.Queue[_Waiting]) -> None:
        while True:
            call, share = await queue.get()
            if share is not None and not (engine.room and engine.room.is_current(share)):
                continue
            lines = engine.headers + call.headers + _JSON
            done = False
            try:
                answer = await engine.client.request("POST", call.path, lines, call.body, timeout_s=_CALL_S)
                done = answer.status == 200
            except Unreachable:
                # If the engine is down, its leases are gone too; else their deadline ends them.
                self.failed += 1
            _ended(engine, share, done)


def _ended(engine: Engine, share: Share | None, done: bool) -> None:
    """Give room back only for KV that is free."""
    if share is not None and engine.room is not None:
        (engine.room.give_back if done else engine.room.leak)(share)
