"""Executors compute an engine's steps. One file per kind: `single` computes in this process, on one device.

The core decides what a step computes. An executor computes it, and owns the KV of all devices. A block id refers to the
same block on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pdctl.engine.ipc.messages import Logprobs
from pdctl.engine.schedule.batch import Slice

# For each sampling slice and each of its drafts, in order: a token id, and its log probabilities if requested.
Computed = tuple[list[int], list[Logprobs | None]]


class Launched(Protocol):
    """A step that computes."""

    def finish(self) -> Computed:
        """Its results. Waits for them, but not for a step that was launched after it."""
        ...


class Executor(Protocol):
    """Computes batches over the KV pool, one after another."""

    def launch(self, batch: list[Slice], after: Launched | None = None) -> Launched:
        """Begin to compute a step. `after`: the step before it, if that is not finished: all slices of both are plain
        (`schedule.ahead`), and this one's input tokens are those that the other samples. Until a step is finished, only
        the tokens and the last blocks of its sequences may change, by what `Scheduler.schedule_ahead` allows."""
        ...

    def publish(self, block_ids: Sequence[int]) -> None:
        """Make the computed KV of these blocks readable for peers."""
        ...

    def close(self) -> None:
        """Free resources. No step may follow."""
        ...
