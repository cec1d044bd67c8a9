"""One API key sends 50 times what another one does: how long the other one waits for its first token.

    python -m benchmarks.fairness [--rounds 3] [--seconds 30] [--rate 2] [--model tiny-qwen3] [--chunk 512] [--hybrid]
                                  [--short]
    python -m benchmarks.fairness --virtual

Real engines (1 prefill + 1 decode, or one hybrid). In each round, in turn: the key alone; the key beside the flood of
another key; the key beside the same flood of its own, which is what it would be without fair shares. `--virtual`: the
admission and the scheduler that ship, in virtual time, at the speed of Gemma 3 270M on one core, for several lengths of
prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop

from pdctl.net.http_client import ConnectionPool
from pdctl.wire import TIMING_HEADER
from tests.proxy.request.virtual_proxy import Load, VirtualProxy
from tests.service import Run, Service, running, topology
from tests.service import single as service_of_one

TIMES = 50
KEYS = ("single", "flood")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")


@dataclass
class Outcome:
    """What one key got. Seconds."""

    ttft_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def quantile(self, part: float) -> float:
        waits = sorted(self.ttft_s) or [float("nan")]
        return waits[min(len(waits) - 1, int(len(waits) * part))]


@dataclass(frozen=True)
class Traffic:
    """Poisson arrivals at `rate` per second, with prompts of so many words and answers of so many tokens."""

    words: int
    tokens: int
    rate: float
    seconds: float


async def one(client: ConnectionPool, key: str, traffic: Traffic, prompt: str, outcome: Outcome) -> None:
    fields = {"prompt": prompt, "max_tokens": traffic.tokens, "stream": True, "ignore_eos": True}
    head = f"content-type: application/json\r\nauthorization: Bearer {secret(key)}\r\n{TIMING_HEADER}: 1\r\n".encode()
    started = time.monotonic()
    exchange = client.exchange("POST", "/v1/completions", head, json.dumps(fields).encode())
    first = 0.0
    try:
        status = await exchange.head()
        outcome.statuses[status] += 1
        if status != 200:
            await exchange.rest()
            return
        said = (exchange.header(TIMING_HEADER.encode()) or "").partition("queue;dur=")[2]
        outcome.queue_s.append(float(said.partition(",")[0] or "nan") / 1000)
        while (data := await exchange.read()) is not None:
            assert b'"error"' not in data, data
            if b'"text"' in data:
                first = first or time.monotonic()
    finally:
        exchange.close()
    outcome.ttft_s.append(first - started)


async def send(client: ConnectionPool, key: str, traffic: Traffic, draw: random.Random, outcome: Outcome) -> None:
    end, at = time.monotonic() + traffic.seconds, time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        while (at := at + draw.expovariate(traffic.rate)) < end:
            # A prompt that no earlier phase has had: it must not be found in the cache.
            prompt = f"{random.random()} " + " ".join(random.choices(WORDS, k=traffic.words))
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.create_task(one(client, key, traffic, prompt, outcome))


async def phase(
    client: ConnectionPool, single: Traffic, flood: Traffic | None, key: str, number: int
) -> dict[str, Outcome]:
    """Within a round the key's requests come at the same times in each phase: they meet each other alike."""
    found = {name: Outcome() for name in KEYS}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send(client, "single", single, random.Random(number), found["single"]))
        if flood is not None:
            tasks.create_task(send(client, key, flood, random.Random(-1 - number), found["flood"]))
    return found


async def measure(service: Service, single: Traffic, flood: Traffic, rounds: int, is_short: bool) -> int:
    client = ConnectionPool("127.0.0.1", int(service.url.rpartition(":")[2]), connect_s=10)
    every: dict[str, dict[str, Outcome]] = {}
    try:
        await phase(client, replace(single, seconds=20.0), None, "", 0)  # engines and proxy are warm afterwards
        kinds: list[tuple[str, Traffic | None, str]] = [("alone", None, ""), ("beside another key", flood, "flood")]
        if not is_short:
            kinds.append(("beside its own flood", flood, "single"))
        for number in range(rounds):
            for name, other, key in kinds:
                found = await phase(client, single, other, key, number)
                total = every.setdefault(name, {key: Outcome() for key in KEYS})
                for each, outcome in found.items():
                    total[each].ttft_s += outcome.ttft_s
                    total[each].queue_s += outcome.queue_s
                    total[each].statuses += outcome.statuses
                print(f"round {number + 1}, {name}: {shown(found['single'])}", flush=True)
    finally:
        client.close()
    for name, total in every.items():
        ratio = total["single"].quantile(0.99) / every["alone"]["single"].quantile(0.99)
        print(f"{name}: {shown(total['single'])}, {ratio:.2f} times alone; flood {shown(total['flood'])}")
    return 0


def shown(outcome: Outcome) -> str:
    p50, p99 = (1000 * outcome.quantile(part) for part in (0.5, 0.99))
    queue = 1000 * statistics.fmean(outcome.queue_s or [0.0])
    return f"TTFT p50 {p50:.0f} ms, p99 {p99:.0f} ms, {queue:.1f} ms of it in the proxy, {dict(outcome.statuses)}"


def secret(key: str) -> str:
    return f"pdctl-{key}"


def virtual() -> None:
    """A key with 3% of the engine's time, beside 50 times as many requests."""
    print("prompts of the key and of the flood; TTFT p50, p99: alone, beside the flood, without fair shares")
    for prompt in (200, 800, 2000):
        rate = 0.03 / (3e-3 * prompt)
        single, seconds = Load("single", rate, prompt), 400 / rate
        for length in (200, 800, 4000):
            flood = Load("flood", TIMES * rate, length)
            alone = VirtualProxy().run(single, seconds=seconds)
            fair, unfair = (VirtualProxy(fair=fair).run(single, flood, seconds=seconds) for fair in (True, False))
            cells = [f"{run.ttft('single', 0.5):.2f} {run.ttft('single', 0.99):.2f}" for run in (alone, fair, unfair)]
            ratio = fair.ttft("single", 0.99) / alone.ttft("single", 0.99)
            lost = [run.refused.get("single", 0) for run in (fair, unfair)]
            print(f"{prompt:5} {length:5}  {'   '.join(cells)}   p99 {ratio:.2f} times; refused {lost}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second of the key; the flood: 50 times")
    parser.add_argument("--words", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--chunk", type=int, default=512, help="max_num_batched_tokens of the engines")
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--short", action="store_true", help="without the key's own flood")
    found = parser.parse_args()
    if found.virtual:
        virtual()
        return 0
    random.seed(5)
    single = Traffic(found.words, found.tokens, found.rate, found.seconds)
    flood = Traffic(found.words, found.tokens, TIMES * found.rate, found.seconds)
    made = service_of_one if found.hybrid else topology
    chunk = f"max_num_batched_tokens = {found.chunk}"
    text = made(model=f"sample:{found.model}", extra='api_keys = "keys.txt"', engine_extra=chunk)
    with tempfile.TemporaryDirectory(prefix="pf") as folder:
        run = Run(Path(folder), poison=False)
        lines = [f"{key} sha256:{hashlib.sha256(secret(key).encode()).hexdigest()}\n" for key in KEYS]
        run.write("".join(lines), "keys.txt")
        with running(run, text) as service:
            return uvloop.run(measure(service, single, flood, found.rounds, found.short))


if __name__ == "__main__":
    sys.exit(main())
