"""Engines in virtual time: the scheduler that ships, with steps whose length a model gives instead of a device.

Days of traffic run in seconds, and always in the same way. One `VirtualTime` can drive several engines and whatever
lies between them (a router, a transfer): each is a set of actions at moments.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from pdctl.engine.schedule.batch import Outcome, Slice
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.latency import StepTimes, step_of

# Every sampling sequence gets this token.
_TOKEN = 1


class VirtualTime:
    """A clock in seconds that jumps from one action to the next."""

    def __init__(self) -> None:
        self._now = 0.0
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        # Actions of one moment run in the order in which they were added.
        self._numbers = count()

    def __call__(self) -> float:
        """The current moment: a `VirtualTime` is a clock for what takes one."""
        return self._now

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Run `action` at `moment`, or now if that is in the past."""
        heapq.heappush(self._actions, (max(moment, self._now), next(self._numbers), action))

    def run(self) -> None:
        """Run until there is no action left."""
        while self._actions:
            self._now, _, action = heapq.heappop(self._actions)
            action()


class VirtualEngine:
    """One engine. `scheduler` reads the clock `time`; `times`: how long its steps take; `deliver` gets what each step
    made, at its end. As in the core's loop, what arrives during a step is handled after it."""

    def __init__(
        self, time: VirtualTime, scheduler: Scheduler, times: StepTimes, deliver: Callable[[Outcome], None]
    ) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.busy_s = 0.0
        self._time = time
        self._times = times
        self._deliver = deliver
        self._inbox: list[Callable[[], None]] = []
        self._is_computing = False

    def add(self, sequence: Sequence) -> None:
        """A request arrives. It must fit into the engine's blocks."""
        self._handle(lambda: self._add(sequence))

    def abort(self, request_id: str) -> None:
        """A request ends, or its KV was read."""
        self._handle(lambda: self.scheduler.abort(request_id))

    def _add(self, sequence: Sequence) -> None:
        failed = self.scheduler.add(sequence)
        assert failed is None, failed

    def _handle(self, message: Callable[[], None]) -> None:
        self._inbox.append(message)
        if not self._is_computing:
            self._begin()

    def _begin(self) -> None:
        for message in self._inbox:
            message()
        self._inbox.clear()
        batch = self.scheduler.schedule()
        if not batch:
            return
        seconds = self._times.seconds(step_of((piece.count, piece.start) for piece in batch))
        assert seconds > 0
        self._is_computing = True
        self.busy_s += seconds
        self._time.at(self._time() + seconds, lambda: self._end(batch, seconds))

    def _end(self, batch: list[Slice], seconds: float) -> None:
        self.steps += 1
        self.scheduler.took(batch, seconds)
        self._deliver(self.scheduler.update(batch, [_TOKEN for piece in batch if piece.samples]))
        self._is_computing = False
        self._begin()
