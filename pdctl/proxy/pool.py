"""The engines as the proxy sees them: reachable or not, how much each has to do, how fast it has been."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from pdctl.adapters import Dialect, dialect
from pdctl.lean_http import Pool, Unreachable
from pdctl.proxy.routing import Load, View
from pdctl.wire import EngineAddress

_log = logging.getLogger(__name__)

# A healthy engine is asked this often, one that is down more often: a restarted engine is used within moments.
_HEALTHY_S, _DOWN_S = 0.5, 0.1
_PROBE_TIMEOUT_S = 2.0
# Weight of the newest sample in the running speed.
_ALPHA = 0.2
# One slow answer of a busy machine is no death: this many unanswered probes in a row are.
_MISSES = 3


@dataclass(slots=True)
class Meter:
    """One kind of work at one engine: how much is pending, and how fast it has been done (0: not known yet)."""

    pending: float = 0.0
    speed: float = 0.0

    @contextmanager
    def working(self, amount: float) -> Iterator[None]:
        """Count `amount` as pending meanwhile, and its speed if it gets done."""
        self.pending += amount
        started = time.monotonic()
        try:
            yield
        finally:
            self.pending -= amount
        sample = amount / max(time.monotonic() - started, 1e-6)
        self.speed = sample if not self.speed else (1 - _ALPHA) * self.speed + _ALPHA * sample


@dataclass(slots=True)
class Engine:
    """One engine. Prompts are measured in bytes of request, hand-overs decoded in streams."""

    address: EngineAddress
    client: Pool
    dialect: Dialect
    healthy: bool = False
    prompts: Meter = field(default_factory=Meter)
    streams: Meter = field(default_factory=Meter)
    misses: int = 0
    calls: set[asyncio.Timeout] = field(default_factory=set)

    @asynccontextmanager
    async def deadline(self, seconds: float) -> AsyncIterator[None]:
        """A time limit for a call here, which is over at once when the engine is found to be down."""
        async with asyncio.timeout(seconds) as limit:
            self.calls.add(limit)
            try:
                yield
            finally:
                self.calls.discard(limit)

    def view(self) -> View:
        """What routing needs to know."""
        return View(
            self.address.name,
            self.address.role,
            self.healthy,
            Load(self.prompts.pending, self.prompts.speed),
            Load(self.streams.pending, self.streams.speed),
        )


@dataclass(slots=True)
class EnginePool:
    """All engines, and the event that one of them came back."""

    engines: list[Engine]
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, addresses: list[EngineAddress]) -> EnginePool:
        """A pool in which nobody is known to be healthy yet."""
        return cls([Engine(a, Pool(a.host, a.port), dialect(a.kind)) for a in addresses])

    def lost(self, engine: Engine) -> None:
        """A call found the engine unreachable; probes decide when it is back."""
        if engine.healthy:
            _log.info("%s is down", engine.address.name)
        engine.healthy = False
        now = asyncio.get_running_loop().time()
        for call in engine.calls:
            # One that is just expiring cannot be changed any more, and need not be.
            if not call.expired():
                call.reschedule(now)

    async def watch_forever(self) -> None:
        """Probe every engine for as long as we run."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines:
                tasks.create_task(self._watch(engine))

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when an engine came back, or after `timeout_s`."""
        self.changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Close every idle connection."""
        for engine in self.engines:
            engine.client.close()

    async def _watch(self, engine: Engine) -> None:
        while True:
            started = time.monotonic()
            try:
                answer = await engine.client.request("GET", "/health", timeout_s=_PROBE_TIMEOUT_S)
                self._seen(engine, answer.status == 200)
            except Unreachable as failure:
                self._seen(engine, False, late=failure.sent)
            pause = _HEALTHY_S if engine.healthy else _DOWN_S
            await asyncio.sleep(max(0.0, pause - (time.monotonic() - started)))

    def _seen(self, engine: Engine, good: bool, late: bool = False) -> None:
        engine.misses = engine.misses + 1 if late else 0
        if late and engine.healthy and engine.misses < _MISSES:
            return
        if good and not engine.healthy:
            _log.info("%s can be used", engine.address.name)
            self.changed.set()
        if engine.healthy and not good:
            self.lost(engine)
        engine.healthy = good
