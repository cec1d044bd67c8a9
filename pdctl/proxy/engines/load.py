"""An engine's pending work and measured speed. Pure except for the shared table's memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.proxy.engines.routing import Load, Recent
from pdctl.proxy.shares.shared_memory import shared_memory

# Weight of the newest sample in the speed's moving average, and the busy seconds per sample.
_ALPHA = 0.3
_SAMPLE_S = 0.25
# An idle engine's speed is unknown after this long, seconds. One that was slow once would else never be tried again.
_KNOWN_S = 30.0
# Duration that an error counts as in the recent window, seconds: slower than any successful answer.
_ERROR_S = 30.0
_WINDOW = 32


@dataclass(slots=True)
class LoadMeter:
    """One kind of work: the pending amount, and the amount done per busy second (0: unknown). `usual`: the speed of
    before, for those who only need an order of magnitude."""

    pending: float = 0.0
    speed: float = 0.0
    usual: float = 0.0
    active: int = 0
    _mark: float = 0.0
    _busy: float = 0.0
    _done: float = 0.0

    def begin(self, amount: float, now: float) -> None:
        """Work was added."""
        if self.active:
            self._busy += now - self._mark
        self._mark = now
        self.active += 1
        self.pending += amount

    def end(self, amount: float, now: float, done: bool) -> None:
        """Work was done, or given up."""
        self._busy += now - self._mark
        self._mark = now
        self.active -= 1
        self.pending = self.pending - amount if self.active else 0.0
        if done:
            self._done += amount
            if self._busy >= _SAMPLE_S or not self.speed:
                sample = self._done / max(self._busy, 1e-6)
                self.speed = sample if not self.speed else (1 - _ALPHA) * self.speed + _ALPHA * sample
                self._busy = self._done = 0.0

    def is_old(self, now: float) -> bool:
        """Whether the speed was measured too long ago to say anything."""
        return not self.active and now - self._mark > _KNOWN_S

    def forget(self) -> None:
        """The speed is unknown."""
        self.usual = self.speed or self.usual
        self.speed = self._busy = self._done = 0.0

    @property
    def changed_at(self) -> float:
        """When work was last begun or ended."""
        return self._mark


@dataclass(slots=True)
class Window:
    """The last few durations of one kind of work; errors count as slow ones."""

    _samples: deque[float] = field(default_factory=deque)
    _sum: float = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration; the oldest is dropped."""
        if len(self._samples) == _WINDOW:
            self._sum -= self._samples.popleft()
        self._samples.append(seconds)
        self._sum += seconds

    def failed(self) -> None:
        """An error."""
        self.add(_ERROR_S)

    def clear(self) -> None:
        """The engine is a new one."""
        self._samples.clear()
        self._sum = 0.0

    def recent(self) -> Recent:
        """The number of samples and their mean."""
        count = len(self._samples)
        return Recent(count, self._sum / count if count else 0.0)


class SharedLoads:
    """The pending work of each proxy worker at each engine, in memory shared by all workers.

    One row per worker with numbers for each engine: of its prompts and of its streams the pending work, the speed and
    the time of the last change. Each worker writes only its own row and reads all. A number that is being written is
    read either before or after the write, which is enough for routing.
    """

    _KINDS = 2
    _EACH = 3

    def __init__(self, path: Path, workers: int, engines: int, worker: int) -> None:
        self._width = engines * self._KINDS * self._EACH
        self._worker = worker
        self._workers = workers
        size = max(1, workers * self._width) * 8
        self._table = memoryview(shared_memory(path, size)).cast("d")
        # Clear the pending work of a previous start of this worker.
        for number in range(self._width):
            self._table[worker * self._width + number] = 0.0

    @property
    def workers(self) -> int:
        """How many workers share it."""
        return self._workers

    def publish(self, engine: int, prompts: LoadMeter, streams: LoadMeter) -> None:
        """Write this worker's numbers for one engine."""
        at = self._worker * self._width + engine * self._KINDS * self._EACH
        table = self._table
        for meter in (prompts, streams):
            table[at], table[at + 1], table[at + 2] = meter.pending, meter.speed, meter.changed_at
            at += self._EACH

    def loads(self, engine: int, now: float) -> tuple[Load, Load]:
        """The total load of all workers: prompts and streams."""
        at = engine * self._KINDS * self._EACH
        return self._load(at, now), self._load(at + self._EACH, now)

    def _load(self, at: int, now: float) -> Load:
        table, pending, speed = self._table, 0.0, 0.0
        for row in range(at, self._workers * self._width, self._width):
            pending += table[row]
            # What a worker measured long ago does not count, as in LoadMeter.
            if table[row] or now - table[row + 2] <= _KNOWN_S:
                speed += table[row + 1]
        return Load(pending, speed)
