"""Prefill calls that go on when their request leaves.

Some engines are harmed when a running prefill call is closed (Pairing.prefill_must_finish). Such calls run in the
background from their start: a request that leaves, or waits no longer, leaves its call behind. When the call ends, what
it keeps at the engine is released.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from pdctl.adapters import Prefilled

_log = logging.getLogger(__name__)

# Calls left behind; at this number the next one is closed, which may harm the engine, but is better than no limit.
_MAX_LEFT = 512

Called = Prefilled | Exception


class Unfinished:
    """All of a proxy's calls of this kind."""

    def __init__(self) -> None:
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[Called]] = set()
        self._left: set[asyncio.Task[Called]] = set()
        self._idle = asyncio.Event()

    @property
    def left(self) -> int:
        """Calls without a request."""
        return len(self._left)

    async def run_forever(self) -> None:
        """Own the calls until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await asyncio.Event().wait()

    async def call(
        self, work: Coroutine[object, object, Called], patience_s: float, unwanted: Callable[[Prefilled], None]
    ) -> Called:
        """The result of `work`, which has a deadline of its own and raises nothing. Raises TimeoutError.

        `unwanted` takes its result if nobody waits for it any more.
        """
        assert self._tasks is not None, "calls are made while it runs"
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        done = False
        try:
            async with asyncio.timeout(patience_s):
                found = await asyncio.shield(task)
            done = True
            return found
        finally:
            if not done:
                self._leave(task, unwanted)

    async def settled(self, timeout_s: float) -> None:
        """Return when no call runs, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            _log.warning("%d prefill calls were closed before they ended", len(self._running))

    def _leave(self, task: asyncio.Task[Called], unwanted: Callable[[Prefilled], None]) -> None:
        if len(self._left) >= _MAX_LEFT:
            _log.warning("%d prefill calls have no request any more: one more is closed", _MAX_LEFT)
            task.cancel()
            return

        def ended(task: asyncio.Task[Called]) -> None:
            self._left.discard(task)
            if not task.cancelled() and isinstance(found := task.result(), Prefilled):
                unwanted(found)

        self._left.add(task)
        task.add_done_callback(ended)

    def _ended(self, task: asyncio.Task[Called]) -> None:
        self._running.discard(task)
        self._idle.set()
