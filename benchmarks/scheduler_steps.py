"""What a scheduling step costs with few and with many waiting requests: CPU microseconds per step.

    python -m benchmarks.scheduler_steps [--policy fcfs]

16 sequences decode, and N prompts wait for a seat. A step is `schedule`, `update` and `books`.
"""

from __future__ import annotations

import argparse
import time

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence

SEATS, STEPS = 16, 300


def measure(waiting: int, policy: str) -> tuple[float, float]:
    """Microseconds per step, and per request that is queued and taken out again."""
    limits = Limits(SEATS, 512, 4096, 16, frozenset(), policy=policy)
    scheduler = Scheduler(limits, BlockAllocator(20_000), root=b"root")
    for number in range(SEATS):
        scheduler.add(Sequence(f"r{number}", [number] * 30, 30, Sampling(max_tokens=4000)))
    while scheduler.books(0).running < SEATS or scheduler.running.partial:
        step(scheduler)
    for number in range(waiting):
        length = 50 + number % 400
        scheduler.add(Sequence(f"w{number}", [number % 300] * length, length, Sampling(max_tokens=10)))
    step(scheduler)
    began = time.process_time()
    for _ in range(STEPS):
        step(scheduler)
    steps = time.process_time() - began
    began = time.process_time()
    for number in range(waiting):
        scheduler.abort(f"w{number}")
    return steps / STEPS * 1e6, (time.process_time() - began) / waiting * 1e6


def step(scheduler: Scheduler) -> None:
    """One step, in which every sampling sequence gets the same token."""
    batch = scheduler.schedule()
    scheduler.update(batch, [7 for piece in batch if piece.samples])
    scheduler.books(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", choices=list(POLICIES), default="fcfs")
    policy = parser.parse_args().policy
    print(f"{'waiting':>8} {'us a step':>10} {'us an abort':>12}")
    for waiting in (10, 100, 1000, 10_000):
        best = min(measure(waiting, policy) for _ in range(3))
        print(f"{waiting:8} {best[0]:10.1f} {best[1]:12.1f}")


if __name__ == "__main__":
    main()
