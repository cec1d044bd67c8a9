"""Looks for the highest rate at which enough answers still meet their targets: doubles until they do not, then tries
the geometric middle between the best rate that held and the lowest that did not. Pure: rates out, attainments in."""

from __future__ import annotations

from dataclasses import dataclass, field

# The search ends when what held and what did not are this near.
_NEAR = 1.1
_MOST_STEPS = 16


@dataclass(slots=True)
class Search:
    """`wanted`: the part of what was asked that must meet its targets. `tried`: (rate, attainment), in order."""

    first: float
    wanted: float = 0.9
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def held(self) -> float:
        """The highest rate that held; 0 where none did."""
        return max((rate for rate, part in self.tried if part >= self.wanted), default=0.0)

    @property
    def broke(self) -> float | None:
        """The lowest rate above it that did not."""
        return min((rate for rate, part in self.tried if part < self.wanted and rate > self.held), default=None)

    def next(self) -> float | None:
        """The rate to try now; None when the answer is known well enough."""
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
