"""Counters and histograms that cost one dictionary update each and can be summed over workers."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

Key = tuple[str, tuple[str, ...]]


class Histogram:
    """Counts by upper bound; the last count is for larger values."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Add `count` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class _Saved(msgspec.Struct):
    counters: list[tuple[str, list[str], float]]
    histograms: dict[str, tuple[list[int], float]]


class Counters:
    """All counters of a worker. The exporter gives names and labels their meaning."""

    def __init__(self, histograms: dict[str, Histogram]) -> None:
        self.histograms = histograms
        self.values: defaultdict[Key, float] = defaultdict(float)

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        self.values[name, labels] += by

    def of_first_label(self, names: Collection[str]) -> dict[str, dict[str, float]]:
        """The values of these counters, summed by their first label: by label, then by name."""
        found: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for (name, labels), value in self.values.items():
            if name in names:
                found[labels[0]][name] = found[labels[0]].get(name, 0.0) + value
        return found

    def by_name(self, names: Collection[str]) -> dict[str, dict[tuple[str, ...], float]]:
        """The values of these counters, by name and labels; empty for one that has counted nothing."""
        found: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in names}
        for (name, labels), value in self.values.items():
            if name in found:
                found[name][labels] = value
        return found

    def save(self, path: Path) -> None:
        """Save the counters for the other workers."""
        saved = _Saved(
            [(name, list(labels), value) for (name, labels), value in self.values.items()],
            {name: (found.counts, found.total) for name, found in self.histograms.items()},
        )
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(saved))
        new.replace(path)

    def with_others(self, paths: Iterable[Path]) -> Counters:
        """The sum of these counters and those saved by others."""
        found = Counters({name: _copy(histogram) for name, histogram in self.histograms.items()})
        found.values.update(self.values)
        for path in paths:
            try:
                saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
            except (OSError, msgspec.DecodeError):
                continue
            for name, labels, value in saved.counters:
                found.count(name, *labels, by=value)
            for name, (counts, total) in saved.histograms.items():
                histogram = found.histograms[name]
                histogram.counts = [ours + theirs for ours, theirs in zip(histogram.counts, counts, strict=True)]
                histogram.total += total
        return found


def _copy(histogram: Histogram) -> Histogram:
    found = Histogram(histogram.bounds)
    found.counts, found.total = list(histogram.counts), histogram.total
    return found
