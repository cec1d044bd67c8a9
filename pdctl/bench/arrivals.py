"""Send times of requests, in seconds after the start, in the order of the workload."""

from __future__ import annotations

import math
import random


def gamma(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """`rate` requests per second on average, with gamma-distributed gaps of shape `burstiness`: 1 is a Poisson process,
    less makes bursts, more is steadier (as in vLLM's `bench serve`). Scaled so that the last request is sent at
    `count / rate` seconds."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]
    scale = count / rate / sum(gaps) if count else 0.0
    return _summed([gap * scale for gap in gaps])


def ramp(count: int, first: float, last: float, rng: random.Random) -> list[float]:
    """From `first` to `last` requests per second, changing linearly from request to request."""
    rates = [first + (last - first) * number / max(1, count - 1) for number in range(count)]
    return _summed([rng.expovariate(rate) for rate in rates])


def scaled(times: list[float], speed: float) -> list[float]:
    """A trace's own times, replayed at `speed` (2 = twice as fast), starting at 0."""
    start = min(times, default=0.0)
    return [(at - start) / speed for at in times]


def _summed(gaps: list[float]) -> list[float]:
    at, found = 0.0, []
    for gap in gaps:
        at += gap
        found.append(at)
    return found
