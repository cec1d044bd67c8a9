"""Engines in virtual time: the scheduler that ships, with steps whose length a model gives instead of a device.

Days of traffic run in seconds, and always in the same way. One `VirtualTime` can drive several engines and whatever
lies between them (a router, a transfer): each is a set of actions at moments.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count

from pdctl.engine.ipc.messages import Failed
from pdctl.engine.schedule.batch import Outcome, Slice
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.latency import Step, StepTimes, step_of

# Every sampling sequence gets this token.
TOKEN = 1
# As in the core's loop: a step that could not give waiting work any blocks may have freed some for the next one.
_EMPTY_STEPS = 2


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

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` in so many seconds."""
        self.at(self._now + seconds, action)

    def run(self) -> None:
        """Run until there is no action left."""
        while self._actions:
            self._now, _, action = heapq.heappop(self._actions)
            action()


# Runs an action when so many seconds of computing are done.
Processor = Callable[[float, Callable[[], None]], None]


def _refused(failed: Failed) -> None:
    raise AssertionError(failed)


class VirtualEngine:
    """One engine. `scheduler` reads the clock `time`; `times`: how long its steps take; `deliver` gets what each step
    made, at its end; `reserved`: gets sequences that got blocks for KV of a peer; `refused`: what can never fit.
    `processor`: computes the steps, by default in their own time; `stretch`: a factor for each step's time. As in the
    core's loop, what arrives during a step is handled after it, but a hand-over gets its blocks meanwhile. With
    `schedules_ahead` it is handled after the next step, if that was launched already."""

    def __init__(
        self,
        time: VirtualTime,
        scheduler: Scheduler,
        times: StepTimes,
        deliver: Callable[[Outcome], None],
        reserved: Callable[[list[Sequence]], None] = lambda _: None,
        refused: Callable[[Failed], None] = _refused,
        processor: Processor | None = None,
        stretch: Callable[[], float] = lambda: 1.0,
        schedules_ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.busy_s = 0.0
        self.is_dead = False
        self._time = time
        self._times = times
        self._deliver, self._reserved, self._refused = deliver, reserved, refused
        self._processor = processor or time.after
        self._stretch = stretch
        self._schedules_ahead = schedules_ahead
        self._inbox: list[Callable[[], object]] = []
        self._is_computing = False

    def add(self, sequence: Sequence) -> None:
        """A request arrives, or the announcement of a hand-over."""
        if sequence.status is Status.AWAITING_BLOCKS and self._is_computing and not self._inbox:
            # The blocks of the running step are not free, so they are safe.
            self._add(sequence)
            self._reserve()
        else:
            self._handle(partial(self._add, sequence))

    def abort(self, request_id: str) -> None:
        """A request ends, or its KV was read."""
        self._handle(partial(self.scheduler.abort, request_id))

    def pull_ended(self, request_id: str) -> None:
        """A transfer into blocks of this request is over."""
        self._handle(partial(self.scheduler.pull_ended, request_id))

    def start(self, request_id: str) -> None:
        """The KV of this request is here and committed."""
        self._handle(partial(self.scheduler.start, request_id))

    def die(self) -> None:
        """The process ends: nothing that it has comes out any more."""
        self.is_dead = True
        self._inbox.clear()

    def _add(self, sequence: Sequence) -> None:
        if (failed := self.scheduler.add(sequence)) is not None:
            self._refused(failed)

    def _reserve(self) -> None:
        if reserved := self.scheduler.reserve():
            self._reserved(reserved)

    def _handle(self, message: Callable[[], object]) -> None:
        if self.is_dead:
            return
        self._inbox.append(message)
        if not self._is_computing:
            self._begin()

    def _begin(self) -> None:
        # Handling a message may bring the next one.
        self._is_computing = True
        batch: list[Slice] = []
        empty = 0
        while not batch and empty < _EMPTY_STEPS:
            self._take_messages()
            batch = self.scheduler.schedule()
            empty = empty + 1 if self.scheduler.has_work else _EMPTY_STEPS
        self._is_computing = bool(batch)
        if batch:
            self._compute(batch)

    def _compute(self, batch: list[Slice]) -> None:
        step = step_of((piece.count, piece.start) for piece in batch)
        ahead: list[Slice] = []
        if self._schedules_ahead:
            self._reserve()
            ahead = self.scheduler.schedule_ahead(batch, is_quiet=not self._inbox)
        self._processor(self._seconds(step), partial(self._end, batch, ahead, self._time()))

    def _take_messages(self) -> None:
        while True:
            messages, self._inbox = self._inbox, []
            for message in messages:
                message()
            self._reserve()
            if not self._inbox:
                return

    def _seconds(self, step: Step) -> float:
        seconds = self._times.seconds(step) * self._stretch()
        assert seconds > 0
        return seconds

    def _end(self, batch: list[Slice], ahead: list[Slice], began: float) -> None:
        if self.is_dead:
            return
        self.steps += 1
        seconds = self._time() - began
        self.busy_s += seconds
        self.scheduler.took(batch, seconds)
        self._deliver(self.scheduler.update(batch, [TOKEN for piece in batch if piece.samples]))
        if ahead and not self.is_dead:
            self._compute(ahead)
        else:
            self._is_computing = False
            self._begin()
