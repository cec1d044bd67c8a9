"""The stage's page on a port of this machine, served in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from pdctl.net.serving import listen_tcp
from pdctl.supervisor.dashboard.access import Gate
from tests.supervisor.dashboard.stage import SECRET, Stage, serve, staged


class Served(NamedTuple):
    """`read` and `write`: the tokens."""

    stage: Stage
    url: str
    read: str
    write: str

    def client(self, token: str, **headers: str) -> httpx.Client:
        """A client with that token, "" for none."""
        given = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers={**given, **headers}, trust_env=False, timeout=120)

    def link(self, write: bool = False) -> str:
        return f"{self.url}/#{self.write if write else self.read}"


@contextmanager
def served() -> Iterator[Served]:
    """A stage that is served as long as this lasts."""
    gate, listener = Gate(SECRET, "127.0.0.1"), listen_tcp("127.0.0.1", 0)
    listener.setblocking(False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def run(stage: Stage) -> None:
        async with asyncio.TaskGroup() as tasks:
            page = tasks.create_task(serve(stage, gate, listener))
            await stop.wait()
            page.cancel()

    with staged() as stage:
        thread = threading.Thread(target=lambda: loop.run_until_complete(run(stage)))
        thread.start()
        try:
            yield Served(stage, url, gate.token(write=False), gate.token(write=True))
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(120)
            assert not thread.is_alive()
            loop.close()
