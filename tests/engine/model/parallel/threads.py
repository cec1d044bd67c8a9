"""Ranks as threads of one process, for dense forward passes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from pdctl.engine.model.parallel import Group

Result = TypeVar("Result")
Passed = queue.SimpleQueue[torch.Tensor]


class _Meeting:
    """Of the ranks of a stage."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor | None] = [None] * size
        self.exchanges = 0


class ThreadRank:
    """See Group. `before`, `after`: from and to the rank with the same number in the stages beside its own."""

    def __init__(self, rank: int, meeting: _Meeting, place: tuple[int, int], before: Passed, after: Passed) -> None:
        self.rank = rank
        self.size = meeting.size
        self.stage, self.stages = place
        self.stripe, self.stripes = 0, 1
        self.gives_back = True
        self._meeting = meeting
        self._before, self._after = before, after

    def meet(self) -> None:
        self._meeting.barrier.wait()

    def gather(self, part: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        raise AssertionError("no rows are shared")

    def pass_on(self, hidden: torch.Tensor) -> None:
        self._after.put(hidden.clone())

    def take(self, like: torch.Tensor) -> torch.Tensor:
        found = self._before.get(timeout=60)
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        return found

    def add(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(part)).sum(0)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(part), -1)

    def _all(self, part: torch.Tensor) -> list[torch.Tensor]:
        met = self._meeting
        met.parts[self.rank] = part
        met.barrier.wait()
        found = [one.clone() for one in met.parts if one is not None]
        met.barrier.wait()
        met.exchanges += self.rank == 0
        assert len({one.shape for one in found}) == 1, "ranks exchange tensors of one shape"
        return found


def ranks(size: int, stages: int = 1) -> list[Group]:
    """The ranks of a group, stage after stage."""
    passed: list[list[Passed]] = [[queue.SimpleQueue() for _ in range(size)] for _ in range(stages)]
    found: list[Group] = []
    for stage in range(stages):
        meeting = _Meeting(size)
        for rank in range(size):
            found.append(ThreadRank(rank, meeting, (stage, stages), passed[stage - 1][rank], passed[stage][rank]))
    return found


def together(work: list[Callable[[], Result]]) -> list[Result]:
    """Run the work of each rank in a thread of its own."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [found.result(timeout=120) for found in [pool.submit(one) for one in work]]
