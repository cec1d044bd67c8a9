"""CPU time and resident memory of process trees, measured for all of them in one pass over /proc."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """`cpu_s`: seconds of CPU time so far; `rss` in bytes; of a process and everybody below it."""

    cpu_s: float
    rss: int
    pids: frozenset[int]


def read_uses(leaders: Iterable[int]) -> dict[int, Use]:
    """Usage by leader; leaders that are gone are omitted."""
    parents, costs = _all()
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    return {leader: _sum(leader, children, costs) for leader in leaders if leader in costs}


def _all() -> tuple[dict[int, int], dict[int, tuple[float, int]]]:
    # Imported here: the supervisor needs it only for a status call, and the import takes a tenth of a second.
    import psutil

    parents: dict[int, int] = {}
    costs: dict[int, tuple[float, int]] = {}
    for process in psutil.process_iter(["ppid", "cpu_times", "memory_info"]):
        found = process.info
        if found["cpu_times"] is None or found["memory_info"] is None:
            continue
        parents[process.pid] = found["ppid"]
        costs[process.pid] = (found["cpu_times"].user + found["cpu_times"].system, found["memory_info"].rss)
    return parents, costs


def _sum(leader: int, children: dict[int, list[int]], costs: dict[int, tuple[float, int]]) -> Use:
    found, waiting = [], [leader]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return Use(sum(costs[pid][0] for pid in found), sum(costs[pid][1] for pid in found), frozenset(found))


class CpuShares:
    """CPU use between two measurements."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}

    def percent(self, pid: int, use: Use, started_at: float) -> float:
        """Percent of one core since the last measurement of this pid, or since its start. `started_at`: monotonic."""
        now = time.monotonic()
        at, seconds = self._before.get(pid, (started_at, 0.0))
        self._before[pid] = (now, use.cpu_s)
        return round(100 * max(0.0, use.cpu_s - seconds) / max(0.01, now - at), 1)

    def keep(self, pids: Iterable[int]) -> None:
        """Forget all other pids."""
        alive = set(pids)
        self._before = {pid: found for pid, found in self._before.items() if pid in alive}
