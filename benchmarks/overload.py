"""Ten times the sustainable rate for a minute: what is served in time, what is refused, how soon all is well again.

    python -m benchmarks.overload [--seconds 60]

Real engines (tiny-qwen3, 1 prefill + 1 decode), `admission = "slo"`. Capacity is measured first: the highest goodput
(answers within both targets) over a ladder of rates. Then ten times that rate, then that rate again.
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

from pdctl.lean_http import Pool
from tests.service import Run, Service, running, topology

TTFT_MS, TPOT_MS, TOKENS = 500, 40, 32


@dataclass
class Outcome:
    """What a phase gave. `refusals`: seconds until each 429."""

    statuses: Counter[int] = field(default_factory=Counter)
    good: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)


BODY = json.dumps(
    {"prompt": "the quick brown fox " * 10, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
).encode()


async def one(client: Pool, outcome: Outcome) -> None:
    started, first, last = time.monotonic(), 0.0, 0.0
    exchange = client.exchange("POST", "/v1/completions", b"content-type: application/json\r\n", BODY)
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
    if first - started <= TTFT_MS / 1000 and (last - first) / (TOKENS - 1) <= TPOT_MS / 1000:
        outcome.good.append(last)


async def phase(client: Pool, rate: float, seconds: float) -> Outcome:
    """Poisson arrivals at `rate` a second."""
    outcome = Outcome()
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        at = time.monotonic()
        while at < end:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.create_task(one(client, outcome))
            at += random.expovariate(rate)
    return outcome


def proxy_rss(service: Service) -> float:
    return psutil.Process(service.process("proxy")["pid"]).memory_info().rss / 2**20


async def measure(service: Service, seconds: float) -> int:
    client = Pool("127.0.0.1", int(service.url.rpartition(":")[2]), connect_s=10)
    try:
        await phase(client, 5, 5)
        ladder = {}
        for rate in (10, 20, 40, 60, 80, 100, 120):
            ladder[rate] = len((await phase(client, rate, 10)).good) / 10
            print(f"  {rate:4d} requests/s: goodput {ladder[rate]:.1f}/s")
        capacity = max(ladder.values())
        base = next(rate for rate, goodput in ladder.items() if goodput == capacity)
        rss = [proxy_rss(service)]
        over = await phase(client, 10 * base, seconds)
        rss.append(proxy_rss(service))
        ended = time.monotonic()
        after = await phase(client, base * 0.8, 10)
        goodput = len(over.good) / seconds
        recovered = sum(1 for at in after.good if at - ended > 5) / 5
        print(f"at {10 * base}/s for {seconds:.0f} s: {dict(over.statuses)}; goodput {goodput:.1f}/s, "
              f"{goodput / capacity:.0%} of capacity ({capacity:.1f}/s)")  # fmt: skip
        if over.refusals:
            print(f"  429 after {statistics.median(over.refusals) * 1000:.1f} ms median, "
                  f"{max(over.refusals) * 1000:.0f} ms worst")  # fmt: skip
        print(f"  proxy RSS {rss[0]:.0f} MB before, {rss[1]:.0f} MB after; 5 to 10 s later, at {base * 0.8:.0f}/s: "
              f"goodput {recovered:.1f}/s, {dict(after.statuses)}")  # fmt: skip
        return 0 if goodput >= 0.9 * capacity else 1
    finally:
        client.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    found = parser.parse_args()
    random.seed(3)
    text = topology(extra=f'admission = "slo"\n[slo]\nttft_ms = {TTFT_MS}\ntpot_ms = {TPOT_MS}')
    with tempfile.TemporaryDirectory(prefix="po") as folder, running(Run(Path(folder), poison=False), text) as service:
        return uvloop.run(measure(service, found.seconds))


if __name__ == "__main__":
    sys.exit(main())
