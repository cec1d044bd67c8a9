"""Axes: where their ticks are, and how these are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# More ticks than this would touch each other on a phone.
MOST_TICKS = 6
# Milliseconds from which an axis is in seconds.
_SECONDS_FROM = 10_000.0


@dataclass(frozen=True, slots=True)
class Axis:
    """`title`: what it shows, with the unit. `ticks`: place on the axis (0 to 1) and text of each."""

    title: str
    ticks: list[tuple[float, str]] = field(default_factory=list)


def step(most: float, count: int = MOST_TICKS) -> float:
    """The distance of ticks: 1, 2 or 5 times a power of ten, so that at most `count` lie between 0 and `most`, both
    included."""
    if not most > 0 or math.isinf(most):
        return 1.0
    least = most / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)


def ticks(most: float, count: int = MOST_TICKS) -> list[float]:
    """Round numbers from 0 to at most `most`."""
    apart = step(most, count)
    return [number * apart for number in range(math.floor(most / apart * (1 + 1e-9)) + 1)]


def ceiling(most: float, count: int = MOST_TICKS) -> float:
    """The smallest tick that is not below `most`: where an axis ends."""
    apart = step(most, count)
    return max(1, math.ceil(most / apart * (1 - 1e-9))) * apart


def written(value: float, apart: float) -> str:
    """A number beside ticks that are `apart`: with as many decimals as these need."""
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    return f"{value:,.{decimals}f}" if decimals <= 6 else f"{value:.3g}"


def numbered(title: str, top: float) -> Axis:
    """An axis from 0 to `top`, with round numbers."""
    apart = step(top)
    return Axis(title, [(value / top, written(value, apart)) for value in ticks(top)])


def counted(title: str, most: float) -> tuple[Axis, float]:
    """An axis of whole numbers for values up to `most`, and where it ends."""
    apart = max(1.0, step(max(most, 1.0)))
    top = apart * math.ceil(max(most, 1.0) / apart)
    return Axis(title, [(apart * n / top, written(apart * n, apart)) for n in range(round(top / apart) + 1)]), top


def parts(title: str, top: float = 1.0) -> Axis:
    """An axis of fractions from 0 to `top`, in percent."""
    apart = step(top * 100)
    return Axis(title, [(value / (top * 100), f"{written(value, apart)}%") for value in ticks(top * 100)])


def of_time(most_ms: float) -> tuple[float, str]:
    """The unit for latencies up to `most_ms`: what milliseconds are multiplied by, and its name."""
    return (0.001, "s") if most_ms >= _SECONDS_FROM else (1.0, "ms")


def latency(milliseconds: float) -> str:
    """A latency with its unit, to three digits: 9.42 ms, 120 ms, 1,234 ms, 12.3 s."""
    factor, unit = of_time(milliseconds)
    value = milliseconds * factor
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
