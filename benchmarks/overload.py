"""Ten times the sustainable rate for a minute: what is served in time, what is rejected, how long recovery takes.

    python -m benchmarks.overload [--seconds 60] [--tokens 32] [--model tiny-qwen3] [--ttft-ms 500] [--tpot-ms 40]

Real engines (1 prefill + 1 decode), `admission = "slo"`. Capacity is measured first: the highest goodput (answers
within both targets) over a series of rates. Then ten times that rate, then that rate again. Clients and proxy share
the two cores with the engines: the CPU that each of them used during the overload is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from pdctl.net.http_client import ConnectionPool
from tests.service import Run, Service, running, topology

# Parts of what the first figure of a service's speed promises, tried one after the other.
LADDER = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


@dataclass(frozen=True)
class Load:
    """One kind of request and its targets, seconds."""

    tokens: int
    ttft_s: float
    tpot_s: float

    def body(self) -> bytes:
        prompt = "the quick brown fox " * 10
        fields = {"prompt": prompt, "max_tokens": self.tokens, "stream": True, "ignore_eos": True}
        return json.dumps(fields).encode()


@dataclass
class Outcome:
    """The results of a phase. `refusals`: seconds until each 429."""

    statuses: Counter[int] = field(default_factory=Counter)
    good: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)


async def one(client: ConnectionPool, load: Load, body: bytes, outcome: Outcome) -> None:
    started, first, last = time.monotonic(), 0.0, 0.0
    exchange = client.exchange("POST", "/v1/completions", b"content-type: application/json\r\n", body)
    try:
        status = await exchange.head()
        outcome.statuses[status] += 1
        if status != 200:
            await exchange.rest()
            outcome.refusals.append(time.monotonic() - started)
            return
        while (data := await exchange.read()) is not None:
            assert b'"error"' not in data, data
            if b'"text"' in data:
                last = time.monotonic()
                first = first or last
    finally:
        exchange.close()
    if first - started <= load.ttft_s and (last - first) / (load.tokens - 1) <= load.tpot_s:
        outcome.good.append(last)


async def phase(client: ConnectionPool, load: Load, rate: float, seconds: float) -> Outcome:
    """Poisson arrivals at `rate` per second."""
    outcome, body = Outcome(), load.body()
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        at = time.monotonic()
        while at < end:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.create_task(one(client, load, body, outcome))
            at += random.expovariate(rate)
    return outcome


def proxy_rss(service: Service) -> float:
    return psutil.Process(service.process("proxy").pid).memory_info().rss / 2**20


async def saturated(client: ConnectionPool, load: Load) -> float:
    """Requests per second with 32 clients that wait for each answer."""
    outcome, body, end = Outcome(), load.body(), time.monotonic() + 8

    async def again() -> None:
        while time.monotonic() < end:
            await one(client, load, body, outcome)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(32):
            tasks.create_task(again())
    return outcome.statuses[200] / 8


async def measure(service: Service, load: Load, seconds: float) -> int:
    client = ConnectionPool("127.0.0.1", int(service.url.rpartition(":")[2]), connect_s=10)
    try:
        fastest = await saturated(client, load)
        ladder = {}
        for part in LADDER:
            rate = part * fastest
            ladder[rate] = len((await phase(client, load, rate, 10)).good) / 10
            print(f"  {rate:6.1f} requests/s: goodput {ladder[rate]:.1f}/s")
        capacity = max(ladder.values())
        base = next(rate for rate, goodput in ladder.items() if goodput == capacity)
        rss, cpu = proxy_rss(service), cpu_s(service)
        over = await phase(client, load, 10 * base, seconds)
        took = {name: (after - cpu[name]) / seconds for name, after in cpu_s(service).items()}
        ended = time.monotonic()
        after = await phase(client, load, base * 0.8, 10)
        goodput = len(over.good) / seconds
        recovered = sum(1 for at in after.good if at - ended > 5) / 5
        print(f"at {10 * base:.0f}/s for {seconds:.0f} s: {dict(over.statuses)}; goodput {goodput:.1f}/s, "
              f"{goodput / capacity:.0%} of capacity ({capacity:.1f}/s)")  # fmt: skip
        print("  CPU, of a core: " + ", ".join(f"{name} {part:.0%}" for name, part in took.items()))
        if over.refusals:
            print(f"  429 after {statistics.median(over.refusals) * 1000:.1f} ms median, "
                  f"{max(over.refusals) * 1000:.0f} ms worst")  # fmt: skip
        print(f"  proxy RSS {rss:.0f} MB before, {proxy_rss(service):.0f} MB after; 5 to 10 s later, at "
              f"{base * 0.8:.0f}/s: goodput {recovered:.1f}/s, {dict(after.statuses)}")  # fmt: skip
        return 0 if goodput >= 0.9 * capacity else 1
    finally:
        client.close()


def cpu_s(service: Service) -> dict[str, float]:
    """CPU seconds so far of each process of the service with its descendants, and of the clients."""
    found = {}
    leaders = {name: psutil.Process(service.process(name).pid) for name in ("prefill-0", "decode-0", "proxy")}
    for name, leader in leaders.items():
        times = [process.cpu_times() for process in (leader, *leader.children(recursive=True))]
        found[name] = sum(each.user + each.system for each in times)
    own = psutil.Process().cpu_times()
    return {**found, "clients": own.user + own.system}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--ttft-ms", type=int, default=500)
    parser.add_argument("--tpot-ms", type=int, default=40)
    found = parser.parse_args()
    random.seed(3)
    load = Load(found.tokens, found.ttft_ms / 1000, found.tpot_ms / 1000)
    text = topology(
        model=f"sample:{found.model}",
        extra=f'admission = "slo"\n[slo]\nttft_ms = {found.ttft_ms}\ntpot_ms = {found.tpot_ms}',
    )
    with tempfile.TemporaryDirectory(prefix="po") as folder, running(Run(Path(folder), poison=False), text) as service:
        return uvloop.run(measure(service, load, found.seconds))


if __name__ == "__main__":
    sys.exit(main())
