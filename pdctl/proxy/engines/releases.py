"""Calls that release what a request left on an engine, made in the background with one queue per engine."""

from __future__ import annotations

import asyncio

from pdctl.adapters import Call
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.proxy.engines.pool import Engine

# Limit of waiting releases per engine; for others the leases end at their deadline.
_MAX_WAITING = 1024
_CALL_S = 5.0
_JSON = header_lines({"content-type": "application/json"})


class Releases:
    """`put` never blocks and works during cancellation. An engine that does not answer delays only its own queue."""

    def __init__(self) -> None:
        self.failed = 0
        self._queues: dict[str, asyncio.Queue[Call]] = {}
        self._new: asyncio.Queue[tuple[Engine, asyncio.Queue[Call]]] = asyncio.Queue()

    def put(self, engine: Engine, call: Call) -> None:
        """Queue a call. If the queue is full, the engine is dead and its leases end at their deadline."""
        queue = self._queues.get(engine.name)
        if queue is None:
            queue = self._queues[engine.name] = asyncio.Queue(_MAX_WAITING)
            self._new.put_nowait((engine, queue))
        if queue.full():
            self.failed += 1
        else:
            queue.put_nowait(call)

    async def run_forever(self) -> None:
        """Make the calls."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                engine, queue = await self._new.get()
                tasks.create_task(self._serve(engine, queue))

    async def _serve(self, engine: Engine, queue: asyncio.Queue[Call]) -> None:
        while True:
            call = await queue.get()
            try:
                await engine.client.request("POST", call.path, engine.headers + _JSON, call.body, timeout_s=_CALL_S)
            except Unreachable:
                # If the engine is down, its leases are gone too; else their deadline ends them.
                self.failed += 1
