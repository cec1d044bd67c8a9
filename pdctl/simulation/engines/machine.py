"""Processors that several engines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdctl.engine.virtual import VirtualTime

# What is left of a job when it counts as done, seconds: sums of floats are not exact.
_DONE_S = 1e-9


@dataclass(slots=True, eq=False)
class _Job:
    left_s: float
    done: Callable[[], None]


class Machine:
    """`cores` that compute steps, one core a step. More steps than cores share them equally (processor sharing).
    `slowdown`: how many times as long a step takes when all cores are busy, as memory and caches are shared; it grows
    evenly from 1 with a single busy core."""

    def __init__(self, time: VirtualTime, cores: int, slowdown: float = 1.0) -> None:
        assert cores > 0
        assert slowdown >= 1.0
        self.cores, self.slowdown = cores, slowdown
        self._time = time
        self._jobs: list[_Job] = []
        self._since = 0.0
        # Completions that were planned before a later change are void.
        self._plan = 0

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Call `done` when a step that takes so many seconds alone is computed."""
        self._advance()
        self._jobs.append(_Job(seconds, done))
        self._replan()

    @property
    def rate(self) -> float:
        """Seconds of a step that are computed in a second, by each of the running ones."""
        busy = min(len(self._jobs), self.cores)
        if not busy:
            return 1.0
        drag = (self.slowdown - 1) * (busy - 1) / max(1, self.cores - 1)
        return busy / len(self._jobs) / (1 + drag)

    def _advance(self) -> None:
        now = self._time()
        done_s = (now - self._since) * self.rate
        for job in self._jobs:
            job.left_s -= done_s
        self._since = now

    def _replan(self) -> None:
        self._plan += 1
        if self._jobs:
            plan, left_s = self._plan, min(job.left_s for job in self._jobs)
            self._time.after(max(0.0, left_s) / self.rate, lambda: self._complete(plan))

    def _complete(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        least = min(job.left_s for job in self._jobs)
        ended = [job for job in self._jobs if job.left_s <= max(_DONE_S, least)]
        self._jobs = [job for job in self._jobs if job not in ended]
        self._replan()
        for job in ended:
            job.done()
