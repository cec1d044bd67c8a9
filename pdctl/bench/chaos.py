"""Load on a service while its processes are killed and frozen: what clients see, compared with what they saw in quiet.

Every stream is greedy and has been answered before anything was broken, under the same load; afterwards the same
request must get the same text. A request fails that gets an error, breaks off, or is late beyond its deadline.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest

from pdctl.bench import Asked, Record
from pdctl.bench.client import Endpoint, ask_once

# In quiet each client asks, and each request is asked, so often at least: gaps between tokens are to be those of the
# load that will be broken, and answers those that come whatever runs beside them.
_QUIET_ROUNDS = 2
# Wrong answers that are looked at more closely.
_MOST_KEPT = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """`pids`: processes of one unit, its leader first; `what`: kill or freeze."""

    what: str
    name: str
    pids: tuple[int, ...]


@dataclass(slots=True)
class Seen:
    """What clients saw. `unsteady`: requests that are not answered alike each time in quiet, where the engines promise
    that they are. `compared`: answers whose request is answered alike each time in quiet; `wrong`: those that are not
    the quiet one, `differing`: the first of them, quiet text and answer. `pauses`: seconds of the longest silence of
    each stream that met a fault; `recovered`: from each fault until its process was ready again; None where it was not
    in time."""

    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    unsteady: int = 0
    compared: int = 0
    wrong: int = 0
    differing: list[tuple[str, str]] = field(default_factory=list)
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
        elif not self.compared:
            found.append("no answer could be compared: in quiet already they differ from time to time")
        if self.failed:
            found.append(f"{sum(self.failed.values())} requests failed")
        if self.truncated:
            found.append(f"{self.truncated} streams were cut")
        if self.unsteady:
            found.append(f"{self.unsteady} greedy requests are not answered alike each time in quiet")
        if self.wrong:
            found.append(f"{self.wrong} answers differ from the quiet ones")
        if None in self.recovered:
            found.append(f"{self.recovered.count(None)} processes did not come back in time")
        return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Tokens of an answer that the quiet one does not have, or the other way round."""

    lost: int = 0
    repeated: int = 0
    other: int = 0

    def __add__(self, more: Difference) -> Difference:
        """Of both."""
        return Difference(self.lost + more.lost, self.repeated + more.repeated, self.other + more.other)


def difference(quiet: Sequence[int | str], answer: Sequence[int | str]) -> Difference:
    """What must be taken away and put in to make one of the other: between what both begin and end with, by difflib's
    longest matching blocks. What was put in is repeated where the answer has the same before or behind it."""
    shorter = min(len(quiet), len(answer))
    head = next((at for at in range(shorter) if quiet[at] != answer[at]), shorter)
    tail = next((at for at in range(shorter - head) if quiet[-1 - at] != answer[-1 - at]), shorter - head)
    ours, theirs = quiet[head : len(quiet) - tail], answer[head : len(answer) - tail]
    found = Difference()
    for what, begin, end, start, stop in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if what == "delete":
            found += Difference(lost=end - begin)
        elif what == "insert":
            size, at = stop - start, head + start
            more = answer[at : at + size]
            is_twice = more in (answer[max(0, at - size) : at], answer[at + size : at + 2 * size])
            found += Difference(repeated=size) if is_twice else Difference(other=size)
        elif what == "replace":
            found += Difference(other=max(end - begin, stop - start))
    return found


async def expected(endpoint: Endpoint, asked: Sequence[Asked], streams: int) -> tuple[list[str | None], list[float]]:
    """The quiet answers, and the gaps between their tokens, under as many clients as there will be. None for a request
    that is not answered alike each time: nothing can be compared with it. Raises ValueError for one that cannot be
    answered."""
    pool, seats = endpoint.pool(), asyncio.Semaphore(streams)
    repeats = max(_QUIET_ROUNDS, math.ceil(_QUIET_ROUNDS * streams / len(asked)))

    async def one(request: Asked) -> Record:
        async with seats:
            return await ask_once(endpoint, pool, request)

    try:
        async with asyncio.TaskGroup() as tasks:
            # Each time beside others: what runs together must not matter.
            order = random.Random(0)  # noqa: S311 - a workload, not a secret
            turns = [order.sample(range(len(asked)), len(asked)) for _ in range(repeats)]
            running = [(which, tasks.create_task(one(asked[which]))) for turn in turns for which in turn]
    finally:
        pool.close()
    texts: list[set[str]] = [set() for _ in asked]
    gaps: list[float] = []
    for which, task in running:
        record = task.result()
        if not record.is_good:
            raise ValueError(record.error or "the answer broke off")
        texts[which].add(record.text)
        gaps += record.gaps
    return [text.pop() if len(text) == 1 else None for text in texts], gaps


async def load(
    endpoint: Endpoint,
    asked: Sequence[Asked],
    texts: Sequence[str | None],
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


def _note(seen: Seen, record: Record, text: str | None) -> None:
    if record.error:
        seen.failed[record.error[:120]] = seen.failed.get(record.error[:120], 0) + 1
        return
    if record.is_truncated:
        seen.truncated += 1
        return
    seen.answered += 1
    seen.compared += text is not None
    if text is not None and record.text != text:
        seen.wrong += 1
        if len(seen.differing) < _MOST_KEPT:
            seen.differing.append((text, record.text))
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
