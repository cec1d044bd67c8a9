"""What happened between two looks at a service: rates, means and percentiles from counts that only grow. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pdctl.control_api import KvStatus
from pdctl.proxy_wire import Counted, Figures
from pdctl.supervisor.dashboard.messages import EngineLive
from pdctl.wire import EngineState


@dataclass(frozen=True, slots=True)
class Look:
    """A service at one moment: the state of each engine, or why it is unknown; its leases; figures by proxy."""

    states: Mapping[str, EngineState | str]
    kv: KvStatus
    figures: Mapping[str, Figures]


@dataclass(slots=True)
class Rates:
    """Remembers the look before."""

    _at: float = -math.inf
    _figures: Mapping[str, Figures] | None = None
    _tokens: Mapping[str, int] | None = None

    def of(self, at: float, look: Look) -> tuple[dict[str, float], dict[str, EngineLive]]:
        """The columns of a sample, and what each engine does now. `at`: monotonic seconds. The first look has no
        rates; neither has a process that is new since the look before."""
        seconds = max(1e-3, at - self._at)
        values = self._of_proxies(look.figures, seconds)
        engines = self._engines(look, seconds)
        told = [live.tokens_s for live in engines.values() if live.tokens_s is not None]
        if told:
            # Proxies count tokens when a request is over; engines count them as they come.
            values["tokens_s"] = sum(told)
        for name, live in engines.items():
            values[f"{name}/kv"] = live.kv_used if live.kv_used is not None else math.nan
            values[f"{name}/running"], values[f"{name}/waiting"] = float(live.running), float(live.waiting)
        self._at, self._figures = at, look.figures
        self._tokens = {state.epoch: state.tokens_total for state in _known(look).values()}
        return values, engines

    def _of_proxies(self, figures: Mapping[str, Figures], seconds: float) -> dict[str, float]:
        before = self._figures
        found = {"waiting": float(sum(one.waiting for one in figures.values()))} if figures else {}
        pairs = [(before[name], now) for name, now in figures.items() if before is not None and name in before]
        if not pairs:
            return found
        for name in ("tokens", "prompt_tokens", "answered", "failed"):
            found[f"{name}_s"] = sum(_grown(getattr(a, name), getattr(b, name)) for a, b in pairs) / seconds
        for name in ("ttft", "itl"):
            grown = [_difference(getattr(a, name), getattr(b, name)) for a, b in pairs]
            found[f"{name}_mean"], found[f"{name}_p95"] = _mean(grown), quantile(grown, 0.95)
        return found

    def _engines(self, look: Look, seconds: float) -> dict[str, EngineLive]:
        before = self._tokens or {}
        return {
            name: EngineLive(
                running=state.running,
                waiting=state.waiting,
                kv_used=round(1 - state.blocks_free / state.blocks_total, 4) if state.blocks_total else None,
                tokens_s=round(_grown(before[state.epoch], state.tokens_total) / seconds, 2)
                if state.epoch in before
                else None,
                leases=len(state.leases),
                held_back=state.held_back,
            )
            for name, state in _known(look).items()
        }


def quantile(counts: list[Counted], part: float) -> float:
    """An upper percentile of histograms with the same bounds, linear within a bucket; NaN without a value."""
    if not counts:
        return math.nan
    bounds: list[float] = [0.0, *counts[0].bounds]
    sums: list[int] = [sum(column) for column in zip(*(one.counts for one in counts), strict=True)]
    left = part * sum(sums)
    if left <= 0:
        return math.nan
    for number, count in enumerate(sums[:-1]):
        if count and left <= count:
            low, high = bounds[number], bounds[number + 1]
            return low + (high - low) * left / count
        left -= count
    return bounds[-1]


def _mean(counts: list[Counted]) -> float:
    number = sum(sum(one.counts) for one in counts)
    return sum(one.total for one in counts) / number if number else math.nan


def _difference(before: Counted, now: Counted) -> Counted:
    """What came since. A process that was restarted counts from zero again."""
    if sum(now.counts) < sum(before.counts):
        return now
    counts = [max(0, b - a) for a, b in zip(before.counts, now.counts, strict=True)]
    return Counted(now.bounds, counts, max(0.0, now.total - before.total))


def _grown(before: float, now: float) -> float:
    return now - before if now >= before else now


def _known(look: Look) -> dict[str, EngineState]:
    return {name: state for name, state in look.states.items() if isinstance(state, EngineState)}
