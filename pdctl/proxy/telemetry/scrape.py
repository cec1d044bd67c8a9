"""The metrics of the whole service at one address: those of every engine, of the supervisor and of the RDMA ports.

All sources are asked at once, each with its own time limit, so a dead or frozen engine delays a scrape by that time and
takes no other metrics with it. The result is kept for a moment: `/metrics` needs no key, and nobody can make the
engines work by asking for it often.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdctl.host.devices.rdma import RdmaTree, read_tree
from pdctl.net.http_client import Unreachable
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.telemetry import unix_http
from pdctl.proxy.telemetry.exposition import Joined
from pdctl.proxy.telemetry.service_metrics import Status, of_ports, of_status

# Time limit of each source, and the age up to which a result is used again, seconds.
SOURCE_S, _KEPT_S = 1.0, 1.0
# The longest answer of a source. vLLM's is about 100 kB.
_MOST_BYTES = 8 * 2**20
# Lines between two turns of the event loop: answers of clients are waiting.
_LINES = 200
# Neither a failure nor an answer: this kind of engine, or its settings, have no metrics.
_NO_METRICS = 404


@dataclass(slots=True)
class _Round:
    """What one scrape has found. `times`: seconds by source; `good`: whether it answered in time."""

    joined: Joined = field(default_factory=Joined)
    families: list[Metric] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    good: dict[str, bool] = field(default_factory=dict)

    def text(self) -> bytes:
        """The Prometheus text."""
        registry = CollectorRegistry()
        registry.register(_Families([*self.families, *self._own()]))
        return generate_latest(registry) + self.joined.text()

    def _own(self) -> Iterator[Metric]:
        good = GaugeMetricFamily("pdctl_scrape_ok", "1 if the source answered in time", labels=["source"])
        took = GaugeMetricFamily("pdctl_scrape_seconds", "Seconds that the source took", labels=["source"])
        for source, is_good in sorted(self.good.items()):
            good.add_metric([source], float(is_good))
            took.add_metric([source], self.times[source])
        yield from (good, took)


@dataclass(slots=True, eq=False)
class _Families(Collector):
    """Metrics that are there already."""

    families: list[Metric]

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from self.families


class ServiceScrape:
    """Scrapes on request. `supervisor`: its control socket; `sysfs_root`: where the machine's devices are."""

    def __init__(self, pool: EnginePool, supervisor: Path, sysfs_root: Path = Path("/sys")) -> None:
        self._pool = pool
        self._supervisor = supervisor
        self._sysfs_root = sysfs_root
        self._one_at_a_time = asyncio.Lock()
        self._text, self._at = b"", 0.0
        self._reading: asyncio.Future[RdmaTree] | None = None

    async def text(self) -> bytes:
        """The metrics of all sources, at most a second old."""
        async with self._one_at_a_time:
            if not self._text or time.monotonic() - self._at > _KEPT_S:
                self._text = await self._scraped()
                self._at = time.monotonic()
            return self._text

    async def _scraped(self) -> bytes:
        found = _Round()
        async with asyncio.TaskGroup() as tasks:
            for engine in self._pool.engines:
                tasks.create_task(self._source(found, engine.name, partial(self._engine, engine)))
            tasks.create_task(self._source(found, "supervisor", partial(self._status, found)))
            if (self._sysfs_root / "class/infiniband").is_dir():
                tasks.create_task(self._source(found, "rdma", partial(self._ports, found)))
        return found.text()

    async def _source(self, found: _Round, name: str, ask: Callable[[], Awaitable[list[str] | None]]) -> None:
        """Ask one source. It returns lines to add, or None if it has no metrics."""
        began = time.monotonic()
        lines: list[str] | None = []
        try:
            async with asyncio.timeout(SOURCE_S):
                lines = await ask()
            is_good = True
        except (Unreachable, TimeoutError, msgspec.DecodeError, OSError):
            is_good = False
        if lines is None:
            return
        found.good[name], found.times[name] = is_good, time.monotonic() - began
        for start in range(0, len(lines), _LINES):
            found.joined.add(name, lines[start : start + _LINES])
            await asyncio.sleep(0)

    async def _engine(self, engine: Engine) -> list[str] | None:
        exchange = engine.client.exchange("GET", "/metrics", engine.key)
        data = bytearray()
        try:
            status = await exchange.head()
            while (part := await exchange.read()) is not None:
                data += part
                if len(data) > _MOST_BYTES:
                    raise Unreachable(f"the metrics of {engine.name} have more than {_MOST_BYTES} bytes")
        finally:
            exchange.close()
        if status == _NO_METRICS:
            return None
        if status != 200:
            raise Unreachable(f"{engine.name} answered {status} when it was asked for its metrics")
        # Not splitlines: a label's value may contain other line ends.
        return data.decode(errors="replace").split("\n")

    async def _status(self, found: _Round) -> list[str]:
        body = await unix_http.get(self._supervisor, "/v1/status?measurements=0", SOURCE_S, _MOST_BYTES)
        found.families += of_status(msgspec.json.decode(body, type=Status))
        return []

    async def _ports(self, found: _Round) -> list[str]:
        """Counters of some devices take long to read, so a thread does it; one that hangs is not joined by another."""
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(None, read_tree, self._sysfs_root)
        found.families += of_ports(await asyncio.shield(self._reading))
        return []
