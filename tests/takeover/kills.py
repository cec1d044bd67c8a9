"""Kills the proxy again and again under clients, and counts what they found."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.test_tool_calls import FREE, TOOLS
from tests.service import Service, pid_of
from tests.takeover.clients import Clients, Gap, chats, completions

_READY_S = 120.0
# A stream's last bytes may be read so long after the kill.
_ARRIVED_S = 0.3


@dataclass
class Outcome:
    """What a run found. `pauses`: of fast streams around the kill of a proxy alone, from the bytes before it to those
    after it; `with_engine`: where an engine was killed, too, which has to start again."""

    kills: int = 0
    engine_kills: int = 0
    pauses: list[float] = field(default_factory=list)
    with_engine: list[float] = field(default_factory=list)
    clients: Clients | None = None


def part_of(values: list[float], part: float) -> float:
    """A quantile, 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def clients_of(service: Service, with_chats: bool) -> Clients:
    host, port = service.url.removeprefix("http://").split(":")
    requests = completions() | (chats(FREE["hermes"], TOOLS) if with_chats else {})
    return Clients((host, int(port)), requests)


async def kill_again_and_again(
    service: Service,
    kills: int,
    count: int,
    with_chats: bool,
    pairs: int = 0,
    freeze: float = 0.1,
    every_s: float = 0.5,
    say: Any = print,
) -> Outcome:
    """`pairs`: of the kills, so many with an engine killed within 100 ms, in either order; `freeze`: the part of the
    kills before which the proxy is frozen for a moment; `every_s`: mean time that a proxy lives after it is ready."""
    clients = clients_of(service, with_chats)
    await clients.learn()
    outcome, kills_at = Outcome(clients=clients), list[tuple[float, bool]]()
    running = asyncio.create_task(clients.run(count))
    try:
        await asyncio.sleep(2)
        for number in range(kills):
            pid = await until_ready(service)
            await asyncio.sleep(random.uniform(0.05, 2 * every_s))
            began = time.monotonic()
            if number < pairs:
                await kill_pair(service, pid)
                outcome.engine_kills += 1
            else:
                await kill(pid, random.random() < freeze)
            outcome.kills += 1
            await asyncio.sleep(0.05)
            await until_ready(service)
            await asyncio.sleep(0.3)
            kills_at.append((began, number < pairs))
            if number % 10 == 9:
                tally = clients.tally
                say(f"{outcome.kills} kills: {tally.answers} answers, {tally.cut} cut, {tally.wrong} wrong")
            if clients.tally.cut + clients.tally.wrong > 10:
                break
    finally:
        clients.stopping = True
        await running
    outcome.pauses = pauses(clients.tally.gaps, kills_at, with_engine=False)
    outcome.with_engine = pauses(clients.tally.gaps, kills_at, with_engine=True)
    return outcome


def pauses(gaps: list[Gap], kills: list[tuple[float, bool]], with_engine: bool) -> list[float]:
    """How long streams had nothing around a kill: a gap belongs to the first kill that it spans, or that it begins
    right after, with what had arrived before. `kills`: when, and whether an engine was killed, too."""
    found = []
    for gap in gaps:
        spanned = (one for at, one in kills if gap.begin - _ARRIVED_S < at < gap.end)
        if next(spanned, None) is with_engine:
            found.append(gap.end - gap.begin)
    return found


async def kill(pid: int, is_frozen: bool) -> None:
    if is_frozen:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(random.uniform(0.0, 0.2))
    os.kill(pid, signal.SIGKILL)


async def kill_pair(service: Service, pid: int) -> None:
    """The proxy and an engine's core, either first."""
    engine = random.choice([process for process in service.engines() if process.pid is not None])
    cores = psutil.Process(pid_of(engine)).children()
    pids = [pid, cores[0].pid if cores else pid_of(engine)]
    random.shuffle(pids)
    os.kill(pids[0], signal.SIGKILL)
    await asyncio.sleep(random.uniform(0.0, 0.1))
    try:
        os.kill(pids[1], signal.SIGKILL)
    except ProcessLookupError:
        sys.stderr.write("the second of a pair was gone already\n")


async def until_ready(service: Service) -> int:
    """The proxy's pid, when it and all engines are ready."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        processes = (await asyncio.to_thread(service.status)).processes
        if all(process.state == "ready" and process.pid is not None for process in processes):
            return pid_of(next(process for process in processes if process.name == "proxy"))
        await asyncio.sleep(0.05)
    raise AssertionError("not every process came back")


def supervisor_descriptors(service: Service) -> int:
    return len(list(Path(f"/proc/{service.status().supervisor_pid}/fd").iterdir()))
