"""Search for the highest rate at which enough requests meet their targets. It doubles the rate until too few do, then
bisects (geometrically) between the highest good and the lowest bad rate. Pure: rates out, attainments in."""

from __future__ import annotations

from dataclasses import dataclass, field

# The search ends when the lowest bad rate is within this factor of the highest good one.
_NEAR = 1.1
_MOST_STEPS = 16


@dataclass(slots=True)
class Search:
    """`wanted`: the fraction of requests that must meet their targets. `tried`: (rate, attainment), in order."""

    first: float
    wanted: float = 0.9
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def held(self) -> float:
        """The highest good rate; 0 if there is none."""
        return max((rate for rate, part in self.tried if part >= self.wanted), default=0.0)

    @property
    def broke(self) -> float | None:
        """The lowest bad rate above `held`; None if there is none."""
        return min((rate for rate, part in self.tried if part < self.wanted and rate > self.held), default=None)

    def next(self) -> float | None:
        """The next rate to try; None when the search is done."""
        if len(self.tried) >= _MOST_STEPS:
            return None
        if not self.tried:
            return self.first
        if self.broke is None:
            return 2 * self.held
        if not self.held:
            lowest = min(rate for rate, _ in self.tried)
            return lowest / 2 if lowest > self.first / 64 else None
        return (self.held * self.broke) ** 0.5 if self.broke / self.held > _NEAR else None
