"""What processes use, all of them in one pass over /proc: CPU time, resident memory, and of whose tree each is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Use:
    """`cpu_s`: seconds of CPU time so far; `rss` in bytes; of a process and everybody below it."""

    cpu_s: float
    rss: int
    pids: frozenset[int]


def read_uses(leaders: Iterable[int], proc_root: Path = Path("/proc")) -> dict[int, Use]:
    """By leader; leaders that are gone are left out."""
    parents, costs = _all(proc_root)
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    return {leader: _sum(leader, children, costs) for leader in leaders if leader in costs}


def _all(proc_root: Path) -> tuple[dict[int, int], dict[int, tuple[float, int]]]:
    parents: dict[int, int] = {}
    costs: dict[int, tuple[float, int]] = {}
    for name in os.listdir(proc_root):  # noqa: PTH208 - hundreds of Path objects would cost more than the reading
        if not name.isdigit():
            continue
        try:
            with open(f"{proc_root}/{name}/stat", "rb") as file:  # noqa: PTH123
                words = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        # proc(5): the fields after the command, of which the first is number 3.
        parents[int(name)] = int(words[1])
        costs[int(name)] = ((int(words[11]) + int(words[12])) / _TICKS, int(words[21]) * _PAGE)
    return parents, costs


def _sum(leader: int, children: dict[int, list[int]], costs: dict[int, tuple[float, int]]) -> Use:
    found, waiting = [], [leader]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return Use(sum(costs[pid][0] for pid in found), sum(costs[pid][1] for pid in found), frozenset(found))


class CpuShares:
    """CPU use between two looks."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}

    def percent(self, pid: int, use: Use, started_at: float) -> float:
        """Of one core, since the last look at this pid; since its start at the first. `started_at`: monotonic."""
        now = time.monotonic()
        at, seconds = self._before.get(pid, (started_at, 0.0))
        self._before[pid] = (now, use.cpu_s)
        return round(100 * max(0.0, use.cpu_s - seconds) / max(0.01, now - at), 1)

    def keep(self, pids: Iterable[int]) -> None:
        """Forget all others."""
        alive = set(pids)
        self._before = {pid: found for pid, found in self._before.items() if pid in alive}
