"""Ranks that exchange tensors by torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pdctl.engine.model.parallel import RankLost

# All ranks of an engine are on one host.
_INTERFACE = "lo"
# Ranks may load the model at different speeds, from a disk or from the page cache.
_MEET_S = 1800.0


class Width(NamedTuple):
    """Over how many ranks a model is: those that share each layer, stages of these, or stripes."""

    size: int = 1
    stages: int = 1
    stripes: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.size * self.stages * self.stripes


class Ranks:
    """See Group. A call that some rank does not join within `timeout_s` raises RankLost; with NCCL, whose calls only
    queue work, NCCL's watchdog ends the process instead. `number`: of all ranks; those of a stage follow each other."""

    def __init__(self, number: int, width: Width, rendezvous: Path, timeout_s: float, device: torch.device) -> None:
        self.size, self.stages, self.stripes = size, stages, stripes = width
        assert stripes == 1 or size * stages == 1
        self.gives_back = True
        self.stripe, inside = divmod(number, size * stages)
        self.stage, self.rank = divmod(inside, size)
        self._number = number
        self._stage_group: dist.ProcessGroup | None = None
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _INTERFACE
        # A dump for debugging would first wait for all ranks: minutes, while a rank is gone.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        self._timeout_s = timeout_s
        try:
            on_gpu = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=f"file://{rendezvous}",
                rank=number,
                world_size=width.ranks,
                timeout=timedelta(seconds=timeout_s),
                # NCCL then connects now, and finds a GPU that it cannot use.
                device_id=device if on_gpu else None,
            )
            # NCCL waits on the GPU, and says of no rank that it did not come.
            self._meeting = dist.new_group(backend="gloo") if on_gpu else None
            if stages > 1:
                # Every rank makes all of them, in the same order.
                groups = [dist.new_group(list(range(first, first + size))) for first in range(0, size * stages, size)]
                self._stage_group = groups[self.stage]
        except RuntimeError as failure:
            raise RankLost(f"the ranks did not find each other: {_first_line(failure)}") from failure

    def meet(self) -> None:
        """See Group.meet."""
        try:
            dist.monitored_barrier(self._meeting, timedelta(seconds=_MEET_S))
        except RuntimeError as failure:
            raise RankLost(f"a rank did not load the model: {_first_line(failure)}") from failure

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """See Group.add."""
        part = part.contiguous()
        try:
            dist.all_reduce(part, group=self._stage_group)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return part

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """See Group.join."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        try:
            dist.all_gather(parts, part.contiguous(), group=self._stage_group)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return torch.cat(parts, -1)

    def gather(self, part: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See Group.gather."""
        # gloo gathers parts of one size.
        own = part.new_zeros(max(counts), part.shape[1])
        own[: part.shape[0]] = part
        parts = [torch.empty_like(own) for _ in counts]
        try:
            dist.all_gather(parts, own)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)])

    def pass_on(self, hidden: torch.Tensor) -> None:
        """See Group.pass_on."""
        try:
            dist.send(hidden.contiguous(), (self._number + self.size) % (self.size * self.stages))
        except RuntimeError as failure:
            raise self._lost(failure) from failure

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """See Group.take."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        try:
            dist.recv(found, (self._number - self.size) % (self.size * self.stages))
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return found

    def close(self) -> None:
        """Leave the group. Nothing may be exchanged afterwards."""
        # NCCL might wait for ranks that have left; its process ends now.
        if self._meeting is None:
            dist.destroy_process_group()

    def _lost(self, failure: RuntimeError) -> RankLost:
        said = _first_line(failure)
        if "imed out" in said or "imeout" in said:
            return RankLost(f"a rank did not take part in a step within {self._timeout_s:g} s")
        return RankLost(f"a rank is gone: {said}")


def _first_line(failure: RuntimeError) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
