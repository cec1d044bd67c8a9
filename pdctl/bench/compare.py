"""Compare two results: ratios with bootstrap intervals, from the samples in each file.

Requests are resampled, not single gaps: the gaps of one answer are correlated, and would make the intervals too narrow
(cluster bootstrap; Davison and Hinkley, 1997, section 3.8).
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pdctl.bench.measurements import Measurements, Targets, half_width
from pdctl.errors import PdctlError
from pdctl.user_files import read_user_text

# Percentiles to compare: (title, metric, percentile).
_FIGURES = (
    ("TTFT p50", "ttft", 50), ("TTFT p99", "ttft", 99), ("TPOT p50", "tpot", 50), ("TPOT p99", "tpot", 99),
    ("ITL p50", "itl", 50), ("ITL p99", "itl", 99), ("E2E p50", "e2el", 50), ("E2E p99", "e2el", 99),
)  # fmt: skip
_RATES = ("request_throughput", "request_goodput", "output_throughput")
_RESAMPLED = 400
_MOST_LOG = 20.0

# For each request, its values of one metric.
Clusters = list[list[float]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`first` over `second`. `low` and `high`: the 95% interval, None if a single run each cannot give one.
    `more_is_better`: a rate, not a time."""

    name: str
    first: float
    second: float
    ratio: float
    low: float | None
    high: float | None
    more_is_better: bool = False

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high

    @property
    def interval(self) -> str:
        """The interval as text."""
        return "-" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"

    @property
    def verdict(self) -> str:
        """The verdict as text."""
        if self.low is None:
            return "unknown: only one run each"
        if not self.is_shown:
            return "no difference shown"
        return f"first is {'lower' if self.ratio < 1 else 'higher'}: {'better' if self.is_better else 'worse'}"

    @property
    def is_better(self) -> bool:
        """Whether the first is better, if there is a difference."""
        return (self.ratio > 1) is self.more_is_better


def read(path: Path) -> Measurements:
    """Read a result file, from pdctl or from vLLM's `bench serve --save-detailed`. Raises PdctlError."""
    try:
        found = json.loads(read_user_text(path))
    except OSError as failure:
        raise PdctlError(f"{path} cannot be read: {failure.strerror}") from None
    except ValueError as failure:
        raise PdctlError(f"{path} is not JSON: {failure}", "use a result of: pdctl bench serve --out FILE") from None
    if not isinstance(found, dict) or not {"ttfts", "itls", "output_lens"} <= set(found):
        hint = "use a result of: pdctl bench serve --out FILE, or vllm bench serve --save-result --save-detailed"
        raise PdctlError(f"{path} contains no samples (ttfts, itls, output_lens)", hint)
    if reason := _misshapen(found):
        raise PdctlError(f"{path} is not a valid result: {reason}", "check whether it was edited or truncated")
    return found


def _misshapen(found: Measurements) -> str:
    """Why the samples cannot belong to one run; "" if they can."""
    names = [name for name in ("ttfts", "itls", "output_lens", "errors") if name in found]
    lists = {name: _rows(found, name) for name in names}
    if len({len(values) for values in lists.values()}) > 1:
        return f"{', '.join(names)} have different lengths"
    for name in ("ttfts", "output_lens"):
        if not all(isinstance(value, int | float) for value in lists[name]):
            return f"{name} are not all numbers"
    if not all(isinstance(gaps, list) and all(isinstance(gap, int | float) for gap in gaps) for gaps in lists["itls"]):
        return "itls are not all lists of numbers"
    return ""


def with_goodput(measurements: Measurements, targets: Targets) -> Measurements:
    """The result with goodput for these targets, computed from its samples and its duration."""
    ttfts, itls, outputs = (_rows(measurements, name) for name in ("ttfts", "itls", "output_lens"))
    errors = _rows(measurements, "errors") or [""] * len(ttfts)
    met: list[int] = []
    for ttft, gaps, count, error in zip(ttfts, itls, outputs, errors, strict=True):
        whole = ttft + sum(gaps)
        tpot = sum(gaps) / (count - 1) if count > 1 else 0.0
        wanted = ((targets.ttft, ttft), (targets.tpot, tpot), (targets.e2el, whole))
        is_met = bool(count) and not error and all(limit is None or value * 1000 <= limit for limit, value in wanted)
        met.append(int(is_met))
    duration = measurements.get("duration")
    seconds = float(duration) if isinstance(duration, int | float) and duration else 1.0
    ours = measurements.get("pdctl")
    known = ours if isinstance(ours, dict) else {}
    return measurements | {"request_goodput": sum(met) / seconds, "pdctl": {**known, "met": met}}


def samples(measurements: Measurements) -> dict[str, Clusters]:
    """Samples of each metric in milliseconds, by request, of answers without an error."""
    ttfts, itls, outputs = (_rows(measurements, name) for name in ("ttfts", "itls", "output_lens"))
    errors = _rows(measurements, "errors") or [""] * len(ttfts)
    good = [n for n in range(len(ttfts)) if not errors[n] and outputs[n]]
    return {
        "ttft": [[ttfts[n] * 1000] for n in good],
        "tpot": [[sum(itls[n]) / (outputs[n] - 1) * 1000] for n in good if outputs[n] > 1],
        "itl": [[gap * 1000 for gap in itls[n]] for n in good if itls[n]],
        "e2el": [[(float(ttfts[n]) + sum(itls[n])) * 1000] for n in good],
    }


def _rows(measurements: Measurements, name: str) -> list:  # type: ignore[type-arg]  # any JSON values from the file
    value = measurements.get(name)
    return value if isinstance(value, list) else []


def compare(first: Measurements, second: Measurements) -> list[Ratio]:
    """Ratios of every measurement that both have. Rates have an interval if both were repeated."""
    ours, theirs = samples(first), samples(second)
    found = []
    for metric in ("ttft", "tpot", "itl", "e2el"):
        parts = [(title, part) for title, name, part in _FIGURES if name == metric]
        if ours[metric] and theirs[metric]:
            found += [
                _widened(ratio, _over_rounds(first, second, f"p{part}_{metric}_ms", least=3))
                for ratio, (_, part) in zip(_ratios(ours[metric], theirs[metric], parts), parts, strict=False)
            ]
    for name in _RATES:
        one, other = first.get(name), second.get(name)
        if isinstance(one, int | float) and isinstance(other, int | float) and other:
            interval = _over_rounds(first, second, name)
            if name == "request_goodput":
                drawn = _of_met(first, second, one / other)
                both = [found for found in (drawn, interval) if found]
                interval = (min(low for low, _ in both), max(high for _, high in both)) if both else None
            low, high = interval or (None, None)
            title = name.replace("_", " ")
            found.append(Ratio(title, one, other, one / other, low, high, more_is_better=True))
    return found


def _of_met(first: Measurements, second: Measurements, ratio: float) -> tuple[float, float] | None:
    """The interval of goodput, from resampled requests that each met their targets or not. Resampling says nothing
    about the runs' durations, so the interval is extended to cover equal durations."""
    ours, theirs = (_listed_met(measurements) for measurements in (first, second))
    if not ours or not theirs or not sum(ours) or not sum(theirs):
        return None
    rng = random.Random(1)  # noqa: S311 - resampling
    usual = sum(ours) / sum(theirs)
    drawn = sorted(
        sum(rng.choices(ours, k=len(ours))) / below
        for _ in range(_RESAMPLED)
        if (below := sum(rng.choices(theirs, k=len(theirs))))
    )
    low, high = drawn[int(0.025 * len(drawn))], drawn[max(0, int(0.975 * len(drawn)) - 1)]
    faster = ratio / usual
    return min(low, faster * low), max(high, faster * high)


def _listed_met(measurements: Measurements) -> list[int]:
    ours = measurements.get("pdctl")
    met = ours.get("met") if isinstance(ours, dict) else None
    return [int(bool(one)) for one in met] if isinstance(met, list) else []


def _widened(ratio: Ratio, rounds: tuple[float, float] | None) -> Ratio:
    """Widen the interval to that of the rounds: requests of one round are correlated."""
    if rounds is None or ratio.low is None or ratio.high is None:
        return ratio
    return replace(ratio, low=min(ratio.low, rounds[0]), high=max(ratio.high, rounds[1]))


def _over_rounds(first: Measurements, second: Measurements, name: str, least: int = 2) -> tuple[float, float] | None:
    """The interval of the rounds' ratios, from Student's t of their logarithms; None for fewer than `least` rounds."""
    ours, theirs = (_of_rounds(measurements, name) for measurements in (first, second))
    if len(ours) != len(theirs) or len(ours) < least or not all(ours) or not all(theirs):
        return None
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    middle, half = statistics.fmean(logs), half_width(logs)
    # Two rounds can give a huge interval; limit it to what exp() can represent.
    return math.exp(max(-_MOST_LOG, middle - half)), math.exp(min(_MOST_LOG, middle + half))


def _of_rounds(measurements: Measurements, name: str) -> list[float]:
    ours = measurements.get("pdctl")
    repeats = ours.get("repeats") if isinstance(ours, dict) else None
    runs = repeats.get("runs") if isinstance(repeats, dict) else None
    values = runs.get(name) if isinstance(runs, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return []
    return values


def _ratios(ours: Clusters, theirs: Clusters, parts: list[tuple[str, int]]) -> list[Ratio]:
    rng = random.Random(1)  # noqa: S311 - resampling
    one, other = Resampled(ours), Resampled(theirs)
    quantiles = [part for _, part in parts]
    drawn = [(one.draw(rng, quantiles), other.draw(rng, quantiles)) for _ in range(_RESAMPLED)]
    found = []
    for place, (title, part) in enumerate(parts):
        ratios = sorted(a[place] / b[place] for a, b in drawn if b[place])
        above, below = one.percentile(part), other.percentile(part)
        if below and ratios:
            low, high = ratios[int(0.025 * len(ratios))], ratios[max(0, int(0.975 * len(ratios)) - 1)]
            found.append(Ratio(title, above, below, above / below, low, high))
    return found


class Resampled:
    """Percentiles of clustered values, as they are and with resampled clusters. The values are sorted once."""

    def __init__(self, clusters: Sequence[Sequence[float]]) -> None:
        ordered = sorted((value, owner) for owner, values in enumerate(clusters) for value in values)
        self._values = [value for value, _ in ordered]
        self._owners = [owner for _, owner in ordered]
        self._sizes = [len(values) for values in clusters]

    def percentile(self, part: float) -> float:
        """A percentile of the original values; 0 if there are none."""
        from pdctl.bench.measurements import percentile

        return percentile(self._values, part)

    def draw(self, rng: random.Random, parts: Sequence[int]) -> list[float]:
        """Percentiles (ascending) of a resample: the same number of clusters, drawn with replacement."""
        count = len(self._sizes)
        weights = [0] * count
        for owner in rng.choices(range(count), k=count):
            weights[owner] += 1
        total = sum(weight * size for weight, size in zip(weights, self._sizes, strict=True))
        found: list[float] = []
        observed, wanted = 0, [part / 100 * total for part in parts]
        for value, owner in zip(self._values, self._owners, strict=True):
            observed += weights[owner]
            while len(found) < len(wanted) and observed >= wanted[len(found)] and observed:
                found.append(value)
            if len(found) == len(wanted):
                break
        return found
