"""Ranks as threads of one process, for dense forward passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from pdctl.engine.model.parallel import Group

Result = TypeVar("Result")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor | None] = [None] * size
        self.exchanges = 0


class ThreadRank:
    """See Group."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def meet(self) -> None:
        self._meeting.barrier.wait()

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


def ranks(size: int) -> list[Group]:
    """The ranks of a group."""
    meeting = _Meeting(size)
    return [ThreadRank(rank, meeting) for rank in range(size)]


def together(work: list[Callable[[], Result]]) -> list[Result]:
    """Run the work of each rank in a thread of its own."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [found.result(timeout=120) for found in [pool.submit(one) for one in work]]
