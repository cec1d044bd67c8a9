"""Calls of a library that may take long: each in a thread, with a deadline, and none while an earlier one is late."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from pdctl.engine.lifeline import vital
from pdctl.engine.tiers import TierFailed

Result = TypeVar("Result")

# After a failure nothing is tried for so long, seconds: doubled from the first to the longest, with jitter.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0


class Breaker:
    """Whether something that has failed is tried again. Pure; times are monotonic seconds."""

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._failures = 0
        self._until = 0.0
        self._jitter = jitter

    def allows(self, now: float) -> bool:
        """Whether to try."""
        return now >= self._until

    def failed(self, now: float) -> None:
        """Leave it alone for a while."""
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._failures, 10))
        self._until = now + pause_s * (0.5 + 0.5 * self._jitter())
        self._failures += 1

    def worked(self) -> None:
        """It is well."""
        self._failures, self._until = 0, 0.0


class _Call(Generic[Result]):
    """One call. `done` is set when it has ended."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self.done = threading.Event()
        self.is_late = False
        self.result: list[Result] = []
        self.failure: TierFailed | None = None

    def run(self) -> None:
        """Make the call."""
        try:
            self.result.append(self._work())
        except TierFailed as failure:
            self.failure = failure
        finally:
            self.done.set()


class Caller:
    """One thread that makes calls one after another. A call that is late goes on, and everything fails until it has
    ended. `name`: what is called."""

    def __init__(self, name: str, breaker: Breaker) -> None:
        self._name = name
        self._breaker = breaker
        self._calls: queue.SimpleQueue[_Call[object] | None] = queue.SimpleQueue()
        self._newest: _Call[object] | None = None
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=vital(self._run), name=name, daemon=True)
        self._thread.start()

    @property
    def is_free(self) -> bool:
        """Whether a call may be tried now."""
        newest = self._newest
        is_stuck = newest is not None and newest.is_late and not newest.done.is_set()
        return not is_stuck and self._breaker.allows(time.monotonic())

    def call(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """The result: so long for its turn, and again for itself. Raises TierFailed, at once if it has just failed."""
        if not self._turn.acquire(timeout=timeout_s):
            raise TierFailed(f"{self._name} is busy")
        try:
            if not self.is_free:
                raise TierFailed(f"{self._name} has failed just now")
            return self._made(work, timeout_s)
        finally:
            self._turn.release()

    def close(self) -> None:
        """Make no more calls."""
        self._calls.put(None)

    def _made(self, work: Callable[[], Result], timeout_s: float) -> Result:
        call = _Call(work)
        self._newest = cast("_Call[object]", call)
        self._calls.put(self._newest)
        if not call.done.wait(timeout_s):
            call.is_late = True
            self._breaker.failed(time.monotonic())
            raise TierFailed(f"{self._name} does not answer")
        if call.failure is not None:
            self._breaker.failed(time.monotonic())
            raise call.failure
        self._breaker.worked()
        return call.result[0]

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()
