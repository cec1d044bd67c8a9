"""Executes the decisions of `admission`: requests wait here for their seats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.request.admission import Admission, Refusal
from pdctl.proxy.shares.fair_queue import NO_WORK, Waiter, Work
from pdctl.proxy.telemetry.metrics import Metrics

_REASONS = {
    "ttft": "the engines are busy: the first token would come later than the service's target",
    "queue": "too many requests are waiting",
    "wait": "too many requests are waiting: the first token would come later than the service's target",
    "patience": "no engine had room in time",
}
# Interval of queue checks, seconds, for seats that become free without the end of a sequence: engines return, KV is
# freed.
_LOOK_S = 0.25
# Maximum wait of a request's later sequences, seconds. They also wait for the request's earlier ones.
_PATIENCE_OF_MORE_S = 1800.0


class AdmissionDoor:
    """Gives seats to requests. `outlook` returns the pool's state for (bytes of prompt, maximum output tokens)."""

    def __init__(self, admission: Admission, outlook: Callable[[float, int | None], Outlook], metrics: Metrics) -> None:
        self.admission = admission
        self._outlook = outlook
        self._metrics = metrics
        # The seat of each waiting sequence: None once it has it, or why it must leave.
        self._turns: dict[Waiter, asyncio.Future[Refusal | None]] = {}

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self.admission.waiting

    async def enter(
        self, key: str, priority: int, size: float, max_tokens: int | None, is_more: bool = False
    ) -> Waiter:
        """Return when a sequence has a seat; the caller must then call `leave` with what this returned. `is_more`: of
        an admitted request.

        Raises ApiError 429 if the sequence is refused.
        """
        admission = self.admission
        asked = admission.ask(key, priority, self._outlook(size, max_tokens), time.monotonic(), max_tokens, is_more)
        if isinstance(asked, Refusal):
            raise self._refused(asked, key)
        if not asked.granted:
            for waiter, refusal in admission.take_pushed_out():
                self._tell(waiter, refusal)
            await self._wait(asked)
        return asked

    def prefilled(self, seat: Waiter) -> None:
        """The prompt of a sequence is computed: engines may take another one."""
        self.admission.prefilled(seat)
        if self.admission.has_waiters:
            self._move_on()

    def leave(self, seat: Waiter, tpot_s: float | None, actual: Work | None = None) -> None:
        """A sequence has ended. `tpot_s`: None if its request was not answered. `actual`: its work, None for as
        predicted."""
        self.admission.done(seat, time.monotonic(), tpot_s, actual)
        if self.admission.has_waiters:
            self._move_on()

    def measured(self, tpot_s: float) -> None:
        """Record the TPOT of an answer, seconds."""
        self.admission.measured(time.monotonic(), tpot_s)

    async def run_forever(self) -> None:
        """Grant seats that become free without the end of a sequence."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.admission.has_waiters:
                self._move_on()

    async def _wait(self, waiter: Waiter) -> None:
        turn = self._turns[waiter] = asyncio.get_running_loop().create_future()
        self._move_on()
        try:
            async with asyncio.timeout(_PATIENCE_OF_MORE_S if waiter.is_more else self.admission.patience_s):
                if (refusal := await turn) is not None:
                    raise self._refused(refusal, waiter.key)
        except TimeoutError:
            if not waiter.granted:
                raise self._refused(Refusal("patience", 1), waiter.key) from None
        except asyncio.CancelledError:
            if waiter.granted:
                self.leave(waiter, None, NO_WORK)
            raise
        finally:
            self.admission.leave(waiter)
            del self._turns[waiter]

    def _move_on(self) -> None:
        while (waiter := self.admission.next(self._outlook(0.0, None), time.monotonic())) is not None:
            self._tell(waiter, None)

    def _tell(self, waiter: Waiter, refusal: Refusal | None) -> None:
        turn = self._turns[waiter]
        if not turn.done():
            turn.set_result(refusal)

    def _refused(self, refusal: Refusal, key: str) -> ApiError:
        self._metrics.shed(refusal.reason, key)
        message = f"{_REASONS[refusal.reason]}; try again in {refusal.retry_after_s} s"
        return ApiError(429, message, "rate_limit_exceeded", retry_after=refusal.retry_after_s)
