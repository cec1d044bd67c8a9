"""Calls that end what a request left at an engine: made in the background, an engine's own queue for each."""

from __future__ import annotations

import asyncio

from pdctl.adapters import Call
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.proxy.engines.pool import Engine

# Releases that may wait for one engine; more are left to their leases' deadlines.
_MAX_WAITING = 1024
_CALL_S = 5.0
_JSON = header_lines({"content-type": "application/json"})


class Releases:
    """`put` never waits and works while being cancelled; an engine that does not answer delays only its own."""

    def __init__(self) -> None:
        self.failed = 0
        self._queues: dict[str, asyncio.Queue[Call]] = {}
        self._new: asyncio.Queue[tuple[Engine, asyncio.Queue[Call]]] = asyncio.Queue()

    def put(self, engine: Engine, call: Call) -> None:
        """Make this call soon. A full queue means that hundreds wait on a dead engine: they end by deadline."""
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
                # The engine is down, and its leases with it; or the deadline will end them.
                self.failed += 1
