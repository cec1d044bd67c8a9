"""Looks at the service at intervals while the page is on, and keeps what it finds: often while somebody watches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

from pdctl.supervisor.dashboard.history import History
from pdctl.supervisor.dashboard.messages import EngineLive
from pdctl.supervisor.dashboard.rates import Look, Rates
from pdctl.supervisor.rundir.journal import Journal

# Between two samples while somebody watches, and while nobody does, seconds.
WATCHED_S = 1.0
IDLE_S = 5.0


class Viewers:
    """Everybody who watches the page. `came` is set when somebody comes."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self._pulses: set[asyncio.Event] = set()

    def __len__(self) -> int:
        return len(self._pulses)

    def pulse(self) -> None:
        """There is something new."""
        for pulse in self._pulses:
            pulse.set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """Somebody watches as long as this lasts; the event is set when there is something new."""
        pulse = asyncio.Event()
        self._pulses.add(pulse)
        self.came.set()
        try:
            yield pulse
        finally:
            self._pulses.discard(pulse)


class Sampler:
    """Keeps samples in `history`, and what the last one said of each engine. `look`: calls all engines and proxies."""

    def __init__(self, look: Callable[[], Awaitable[Look]], viewers: Viewers) -> None:
        self.history = History()
        self.engines: dict[str, EngineLive] = {}
        self.last: Look | None = None
        self._look = look
        self._viewers = viewers
        self._rates = Rates()
        # Times of samples never go back, even if the clock of the machine does.
        self._epoch = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since 1970, on a clock that never goes back."""
        return self._epoch + time.monotonic()

    async def run_forever(self) -> None:
        """Take samples until cancelled."""
        while True:
            began = time.monotonic()
            self._viewers.came.clear()
            await self.sample()
            await self._rest(began)

    async def sample(self) -> None:
        """Take one sample."""
        look = await self._look()
        values, self.engines = self._rates.of(time.monotonic(), look)
        self.last = look
        self.history.add(self.now(), values)
        self._viewers.pulse()

    async def _rest(self, began: float) -> None:
        """Until the next sample is due: a first viewer need not wait for it."""
        if len(self._viewers):
            await asyncio.sleep(max(0.0, began + WATCHED_S - time.monotonic()))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, began + IDLE_S - time.monotonic())):
                await self._viewers.came.wait()


async def pulse_on_events(journal: Journal, viewers: Viewers) -> None:
    """Tell viewers of every event at once, until cancelled."""
    with journal.followed() as happened:
        while True:
            await happened.wait()
            happened.clear()
            viewers.pulse()
