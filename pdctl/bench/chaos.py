"""Load on a service while its processes are killed and frozen: what clients see, compared with what they saw in quiet.

Every stream is greedy and has been answered once before anything was broken; afterwards the same request must get the
same text. A request fails that gets an error, breaks off, or is late beyond its deadline.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from pdctl.bench import Asked, Record
from pdctl.bench.client import Endpoint, ask_once

_QUIET_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """`pids`: processes of one unit, its leader first; `what`: kill or freeze."""

    what: str
    name: str
    pids: tuple[int, ...]


@dataclass(slots=True)
class Seen:
    """What clients saw. `pauses`: seconds of the longest silence of each stream that met a fault; `recovered`: from
    each fault until its process was ready again; None where it was not in time."""

    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    wrong: int = 0
    pauses: list[float] = field(default_factory=list)
    quiet_gaps: list[float] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    fault_times: list[float] = field(default_factory=list)
    recovered: list[float | None] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept."""
        found = []
        if not self.faults:
            found.append("nothing was broken: nothing is shown")
        if not self.answered:
            found.append("nothing was answered")
        if self.failed:
            found.append(f"{sum(self.failed.values())} requests failed")
        if self.truncated:
            found.append(f"{self.truncated} streams were cut")
        if self.wrong:
            found.append(f"{self.wrong} answers differ from the quiet ones")
        if None in self.recovered:
            found.append(f"{self.recovered.count(None)} processes did not come back in time")
        return found


async def expected(endpoint: Endpoint, asked: Sequence[Asked]) -> tuple[list[str], list[float]]:
    """The quiet answers, and the gaps between their tokens. Raises ValueError for a request that cannot be answered."""
    pool, seats = endpoint.pool(), asyncio.Semaphore(_QUIET_AT_ONCE)

    async def one(request: Asked) -> Record:
        async with seats:
            return await ask_once(endpoint, pool, request)

    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(request)) for request in asked]
    finally:
        pool.close()
    records = [task.result() for task in running]
    for record in records:
        if not record.is_good:
            raise ValueError(record.error or "the answer broke off")
    return [record.text for record in records], [gap for record in records for gap in record.gaps]


async def load(
    endpoint: Endpoint,
    asked: Sequence[Asked],
    texts: Sequence[str],
    streams: int,
    seen: Seen,
    is_over: Callable[[], bool],
) -> None:
    """`streams` clients, each asking again as soon as it is answered, until `is_over`."""
    pool = endpoint.pool()

    async def client(number: int) -> None:
        at = number
        while not is_over():
            which = at % len(asked)
            at += streams
            _note(seen, await ask_once(endpoint, pool, asked[which]), texts[which])
            if seen.failed:
                await asyncio.sleep(0.05)  # a service that refuses at once must not be drowned

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(client(number))
    finally:
        pool.close()


def _note(seen: Seen, record: Record, text: str) -> None:
    if record.error:
        seen.failed[record.error[:120]] = seen.failed.get(record.error[:120], 0) + 1
        return
    if record.is_truncated:
        seen.truncated += 1
        return
    seen.answered += 1
    seen.wrong += record.text != text
    if any(began <= record.ended_at and record.sent_at <= until for began, until in _spans(seen)):
        seen.pauses.append(max([record.ttft, *record.gaps]))


def _spans(seen: Seen) -> list[tuple[float, float]]:
    """From each fault until its process was ready again, or until now."""
    return [
        (began, began + seconds if seconds is not None else math.inf)
        for began, seconds in zip_longest(seen.fault_times, seen.recovered)
    ]


def carry_out(fault: Fault, frozen_s: float, wait: Callable[[float], object]) -> None:
    """Kill the leader, or stop all of them for a while. A process that ended by itself meanwhile is left alone. `wait`
    waits so many seconds, or until nothing more is to be broken."""
    if fault.what == "kill":
        _send(fault.pids[:1], signal.SIGKILL)
        return
    _send(fault.pids, signal.SIGSTOP)
    try:
        wait(frozen_s)
    finally:
        _send(fault.pids, signal.SIGCONT)


def _send(pids: Sequence[int], sign: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, sign)
        except ProcessLookupError:
            continue


def pick(names: Sequence[str], weights: Sequence[str], rng: random.Random) -> tuple[str, str] | None:
    """What to break next: one of `weights` (such as kill:decode or freeze:prefill), and a process of that group."""
    choices = [
        (what, name) for what, _, group in (word.partition(":") for word in weights)
        for name in names if name == group or name.rpartition("-")[0] == group
    ]  # fmt: skip
    return rng.choice(choices) if choices else None
