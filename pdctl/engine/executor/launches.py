"""Starts the steps of one device in order, each before the results of the one before it are read.

A GPU queues what it is asked for. A CPU computes in the thread that asks, so there a thread of their own computes all
steps: the loop prepares the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from pdctl.engine.executor import Computed
from pdctl.engine.model.runner import ModelRunner, Prepared, Sampled
from pdctl.engine.schedule.ahead import is_plain
from pdctl.engine.schedule.batch import Slice

Result = TypeVar("Result")


class Step:
    """See executor.Launched. `sampled`: waits for the device's half of a plain step; None for other steps."""

    def __init__(
        self, batch: list[Slice], computed: Callable[[], Computed], sampled: Callable[[], Sampled] | None = None
    ) -> None:
        self.batch = batch
        self.sampled = sampled
        self._computed = computed

    def finish(self) -> Computed:
        """See executor.Launched.finish."""
        return self._computed()


class Launches:
    """`in_thread`: steps are computed in a thread of their own."""

    def __init__(self, runner: ModelRunner, in_thread: bool) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "steps") if in_thread else None

    def launch(self, batch: list[Slice], after: Step | None = None) -> Step:
        """See Executor.launch."""
        if not all(is_plain(piece) for piece in batch):
            assert after is None, "this step needs the host's tokens"
            return Step(batch, self._run(partial(self._runner.execute, batch)))
        prepared = self._runner.prepare(batch, after.batch if after is not None else None)
        before = after.sampled if after is not None else None
        sampled = self._run(partial(self._start, prepared, before))
        return Step(batch, partial(_computed, sampled), sampled)

    def close(self) -> None:
        """Wait for the step that is computed, if any. No step may follow."""
        if self._thread is not None:
            self._thread.shutdown()

    def _start(self, prepared: Prepared, before: Callable[[], Sampled] | None) -> Sampled:
        return self._runner.start(prepared, before() if before is not None else None)

    def _run(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Run `work`, now or in the thread, behind what runs there. The returned function gives its result."""
        if self._thread is not None:
            return self._thread.submit(work).result
        result = work()
        return lambda: result


def _computed(sampled: Callable[[], Sampled]) -> Computed:
    tokens = sampled().read()
    return tokens, [None] * len(tokens)
