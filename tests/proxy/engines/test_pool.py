"""An engine proves that it lives by a probe sent after it was asked to, over real sockets."""

from __future__ import annotations

import asyncio
import time

import pytest

from pdctl.proxy.engines import pool as pools
from pdctl.proxy.engines.pool import EnginePool
from pdctl.wire import EngineAddress

_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Server:
    """Answers `quick` requests at once, the next one after `slow_s`, and the others at once; None: no more at all."""

    def __init__(self, quick: int, slow_s: float | None) -> None:
        self.probes = 0
        self.connections: set[asyncio.Task[object]] = set()
        self._quick, self._slow_s = quick, slow_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.probes += 1
                if self._slow_s is None and self.probes > self._quick:
                    await reader.read()
                elif self._slow_s is not None and self.probes == self._quick + 1:
                    await asyncio.sleep(self._slow_s)
                writer.write(_OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def proven(server: Server) -> bool:
    """Whether the server's engine, healthy and with a slow probe under way, proves that it lives."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    pool = EnginePool.of([EngineAddress("d0", "decode", "vllm", "127.0.0.1", port)])
    watching = asyncio.ensure_future(pool.watch_forever())
    try:
        engine = pool.engines[0]
        async with asyncio.timeout(120):
            while not engine.healthy or server.probes < 2:
                await asyncio.sleep(0.01)
            return await pool.is_proven(engine, time.monotonic())
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        pool.close()
        listening.close()
        await asyncio.wait(server.connections, timeout=60)


def test_a_slow_probe_under_way_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PROBE_TIMEOUT_S", 60.0)
    assert asyncio.run(proven(Server(quick=1, slow_s=2.5)))


def test_one_that_answers_no_more_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PROBE_TIMEOUT_S", 0.3)
    assert not asyncio.run(proven(Server(quick=1, slow_s=None)))
