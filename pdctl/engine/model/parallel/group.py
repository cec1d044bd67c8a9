"""Ranks that exchange tensors by torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pdctl.engine.model.parallel import RankLost

# All ranks of an engine are on one host.
_INTERFACE = "lo"
# Ranks may load the model at different speeds, from a disk or from the page cache.
_MEET_S = 1800.0


class Ranks:
    """See Group. A call that some rank does not join within `timeout_s` raises RankLost."""

    def __init__(self, rank: int, size: int, rendezvous: Path, timeout_s: float, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _INTERFACE
        self._timeout_s = timeout_s
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as failure:
            raise RankLost(f"the ranks did not find each other: {_first_line(failure)}") from failure

    def meet(self) -> None:
        """See Group.meet."""
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=_MEET_S))
        except RuntimeError as failure:
            raise RankLost(f"a rank did not load the model: {_first_line(failure)}") from failure

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """See Group.add."""
        part = part.contiguous()
        try:
            dist.all_reduce(part)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return part

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """See Group.join."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        try:
            dist.all_gather(parts, part.contiguous())
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        return torch.cat(parts, -1)

    def close(self) -> None:
        """Leave the group. Nothing may be exchanged afterwards."""
        dist.destroy_process_group()

    def _lost(self, failure: RuntimeError) -> RankLost:
        said = _first_line(failure)
        if "imed out" in said or "imeout" in said:
            return RankLost(f"a rank did not take part in a step within {self._timeout_s:g} s")
        return RankLost(f"a rank is gone: {said}")


def _first_line(failure: RuntimeError) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
