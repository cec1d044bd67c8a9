"""Load on a service while its processes are killed and frozen, compared with the same load without faults.

Every request is greedy and was answered before the first fault, under the same load (the "quiet" answer). Later answers
to it must have the same text. A request fails if it gets an error or exceeds its deadline.
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

# Before the first fault, each client sends at least this many requests, and each request is sent at least this many
# times: the gaps between tokens must be those of the same load, and answers must not depend on the rest of the batch.
_QUIET_ROUNDS = 2
# Limit of wrong answers that are kept for a comparison of tokens.
_MOST_KEPT = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault. `pids`: the processes of one unit, its main process first; `what`: kill, freeze, restart or role."""

    what: str
    name: str
    pids: tuple[int, ...]


@dataclass(slots=True)
class Observations:
    """What clients observed. `unsteady`: requests that got different answers before any fault, although the engines
    promise equal ones. `compared`: answers to requests with a stable quiet answer; `wrong`: those that differ from it;
    `differing`: the first of these, as quiet text and answer. `pauses`: for each stream during a fault, its longest
    pause in seconds. `recovered`: for each fault, the seconds until its process was ready again; None if it was not in
    time."""

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
        """Broken promises."""
        found = []
        if not self.faults:
            found.append("no fault was injected: nothing was tested")
        if not self.answered:
            found.append("no request was answered")
        elif not self.compared:
            found.append("no answer could be compared: answers already differed before any fault was injected")
        if self.failed:
            found.append(f"{sum(self.failed.values())} requests failed")
        if self.truncated:
            found.append(f"{self.truncated} streams were cut off")
        if self.unsteady:
            found.append(f"{self.unsteady} greedy requests gave different answers before any fault was injected")
        if self.wrong:
            found.append(f"{self.wrong} answers differ from those before the first fault")
        if None in self.recovered:
            found.append(f"{self.recovered.count(None)} processes were not ready again in time")
        return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Number of tokens by which an answer differs from the quiet one."""

    lost: int = 0
    repeated: int = 0
    other: int = 0

    def __add__(self, more: Difference) -> Difference:
        """The sum of both."""
        return Difference(self.lost + more.lost, self.repeated + more.repeated, self.other + more.other)


def difference(quiet: Sequence[int | str], answer: Sequence[int | str]) -> Difference:
    """The edits that turn the quiet answer into the other one, by difflib, between their common beginning and end.
    Inserted tokens count as repeated if the answer has the same tokens directly before or after them."""
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
    """The quiet answers and the gaps between their tokens, with the same number of clients as later. None for a request
    that got different answers: nothing can be compared with it. Raises ValueError if a request fails."""
    pool, seats = endpoint.pool(), asyncio.Semaphore(streams)
    repeats = max(_QUIET_ROUNDS, math.ceil(_QUIET_ROUNDS * streams / len(asked)))

    async def one(request: Asked) -> Record:
        async with seats:
            return await ask_once(endpoint, pool, request)

    try:
        async with asyncio.TaskGroup() as tasks:
            # A different batch each time: it must not change the answer.
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
            raise ValueError(record.error or "the answer was cut off")
        texts[which].add(record.text)
        gaps += record.gaps
    return [text.pop() if len(text) == 1 else None for text in texts], gaps


async def load(
    endpoint: Endpoint,
    asked: Sequence[Asked],
    texts: Sequence[str | None],
    streams: int,
    observed: Observations,
    is_over: Callable[[], bool],
) -> None:
    """Run `streams` clients until `is_over`. Each sends its next request as soon as the last one is answered."""
    pool = endpoint.pool()

    async def client(number: int) -> None:
        at = number
        while not is_over():
            which = at % len(asked)
            at += streams
            _note(observed, await ask_once(endpoint, pool, asked[which]), texts[which])
            if observed.failed:
                await asyncio.sleep(0.05)  # do not flood a service that refuses at once

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(client(number))
    finally:
        pool.close()


def _note(observed: Observations, record: Record, text: str | None) -> None:
    if record.error:
        observed.failed[record.error[:120]] = observed.failed.get(record.error[:120], 0) + 1
        return
    if record.is_truncated:
        observed.truncated += 1
        return
    observed.answered += 1
    observed.compared += text is not None
    if text is not None and record.text != text:
        observed.wrong += 1
        if len(observed.differing) < _MOST_KEPT:
            observed.differing.append((text, record.text))
    if any(began <= record.ended_at and record.sent_at <= until for began, until in _spans(observed)):
        observed.pauses.append(max([record.ttft, *record.gaps]))


def _spans(observed: Observations) -> list[tuple[float, float]]:
    """The time of each fault: until its process was ready again, or open-ended if it is not."""
    return [
        (began, began + seconds if seconds is not None else math.inf)
        for began, seconds in zip_longest(observed.fault_times, observed.recovered)
    ]


def carry_out(fault: Fault, frozen_s: float, wait: Callable[[float], object]) -> None:
    """Kill the main process, or freeze all processes for a while. A process that has already exited is skipped. `wait`
    waits the given seconds, or until the schedule is over."""
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


# Orders to the supervisor, instead of signals to processes.
ORDERS = ("restart", "role")


def pick(
    names: Sequence[str], weights: Sequence[str], rng: random.Random, far: Sequence[str] = ()
) -> tuple[str, str] | None:
    """Choose the next fault: one of `weights` (such as kill:decode or freeze:prefill) and a process of its group.

    `far`: processes of other machines, which orders reach and signals do not.
    """
    choices = [
        (what, name) for what, _, group in (word.partition(":") for word in weights)
        for name in ([*names, *far] if what in ORDERS else names) if group in (name, group_of(name))
    ]  # fmt: skip
    return rng.choice(choices) if choices else None


def group_of(name: str) -> str:
    """The engine group of a process: its name without NODE/ and number."""
    bare = name.rpartition("/")[2]
    return bare.rpartition("-")[0] or bare
