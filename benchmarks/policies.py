"""The scheduling policies in virtual time, on the lengths and times of public traces, at several loads.

    python -m benchmarks.policies azure_llm_2023_code.csv [--role prefill] [--count 0]

The engine's own scheduler runs; only the length of a step comes from the latency model, at the speed of one CPU core.
As many engines as the load needs get the requests in turn. Half of the requests are interactive, half have six times as
long for their first token.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pdctl.bench.trace import Row, read_rows
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits, Outcome
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.virtual import VirtualEngine, VirtualTime
from pdctl.latency import StepTimes

BLOCK, CHUNK, LONGEST, SEATS, BLOCKS = 16, 512, 16_384, 32, 6000
# Of Gemma 3 270M in float32 on one core (docs/performance.md).
TIMES = StepTimes((0.065, 2.3e-3, 4e-7, 4e-3, 2e-6))
# Targets for the first token, as multiples of the mean time that a prompt takes.
INTERACTIVE, RELAXED = 3.0, 18.0


class Service:
    """Engines that get requests in turn. `role` "prefill": a request ends with its first token."""

    def __init__(self, policy: str, role: str, engines: int = 1) -> None:
        self.time = VirtualTime()
        self.role = role
        self.waits: list[float] = []
        self.attained = 0
        self._asked: dict[str, tuple[float, float]] = {}
        limits = Limits(SEATS, CHUNK, LONGEST, BLOCK, frozenset(), policy=policy)
        self.engines = [
            VirtualEngine(self.time, Scheduler(limits, BlockAllocator(BLOCKS), clock=self.time), TIMES, self._got)
            for _ in range(engines)
        ]

    def send(self, number: int, row: Row, ttft_s: float) -> None:
        """A request arrives now."""
        self._asked[str(number)] = self.time(), ttft_s
        outputs = 1 if self.role == "prefill" else row.outputs
        prompt = [0] * min(row.inputs, LONGEST - outputs)
        sequence = Sequence(str(number), prompt, len(prompt), Sampling(max_tokens=outputs), ttft_s=ttft_s)
        self.engines[number % len(self.engines)].add(sequence)

    def _got(self, outcome: Outcome) -> None:
        for token in outcome.tokens:
            if token.request_id in self._asked:
                sent, ttft_s = self._asked.pop(token.request_id)
                self.waits.append(self.time() - sent)
                self.attained += self.waits[-1] <= ttft_s


def capacity(rows: list[Row], role: str) -> float:
    """Requests per second of one engine, if all of them wait from the beginning."""
    service = Service("fcfs", role)
    for number, row in enumerate(rows):
        service.send(number, row, 1.0)
    service.time.run()
    return len(rows) / service.time()


@dataclass(frozen=True)
class Result:
    """Seconds to the first token, and the part of the requests that had it within their target."""

    p50: float
    p99: float
    longest: float
    attained: float


def replay(rows: list[Row], policy: str, role: str, engines: int, target_s: float) -> Result:
    """Run a trace; interactive requests have `target_s`."""
    service = Service(policy, role, engines)
    rng = random.Random(7)
    for number, row in enumerate(rows):
        target = target_s * rng.choice((1, RELAXED / INTERACTIVE))
        service.time.at(row.at - rows[0].at, partial(service.send, number, row, target))
    service.time.run()
    waits = sorted(service.waits)
    assert len(waits) == len(rows), "a request has no token"
    return Result(waits[len(rows) // 2], waits[len(rows) * 99 // 100], waits[-1], service.attained / len(rows))


def compare(rows: list[Row], role: str, loads: list[float]) -> Iterator[tuple[float, str, Result]]:
    """Every policy at every load."""
    most = capacity(rows[:2000], role)
    offered = len(rows) / (rows[-1].at - rows[0].at)
    work = sum(TIMES.prompt_s(row.inputs, 0, CHUNK) for row in rows) / len(rows)
    print(f"{role}: {most:.3f} requests/s of an engine, a prompt takes {work:.2f} s, targets {INTERACTIVE * work:.1f} "
          f"and {RELAXED * work:.1f} s")  # fmt: skip
    for load in loads:
        engines = round(offered / (load * most))
        for policy in POLICIES:
            yield offered / (engines * most), policy, replay(rows, policy, role, engines, INTERACTIVE * work)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--role", choices=["prefill", "hybrid"], default="prefill")
    parser.add_argument("--count", type=int, default=0, help="requests of the trace; 0: all")
    parser.add_argument("--loads", default="0.7,0.9,1.1")
    found = parser.parse_args()
    rows = read_rows(found.trace)[: found.count or None]
    print("load  policy  TTFT p50, s    p99, s  longest, s  within target")
    for load, policy, result in compare(rows, found.role, [float(load) for load in found.loads.split(",")]):
        seconds = f"{result.p50:12.1f} {result.p99:9.1f} {result.longest:11.1f}"
        print(f"{load:.2f}  {policy:6} {seconds} {result.attained:14.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
