"""The samples behind the page's charts: all of the last minutes, and averages of the last day. Pure, and bounded.

Columns are arrays of 32-bit numbers of a fixed length: a day of samples of 128 engines takes 15 MB, of two 0.6 MB.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence

# Of the newest samples, all are kept; of older ones, an average of each _THIN_S seconds, for a day.
FULL_KEPT = 900
THIN_S = 10.0
THIN_KEPT = 8640
# Columns of the service, and of each engine (named ENGINE/COLUMN); engines beyond so many have no history.
SERVICE_COLUMNS = 9
ENGINE_COLUMNS = 3
MOST_ENGINES = 128
_MOST_COLUMNS = SERVICE_COLUMNS + ENGINE_COLUMNS * MOST_ENGINES
MOST_BYTES = 20 * 10**6

Values = Mapping[str, float]
# By column, oldest first; "at" has the times. None: unknown.
Table = dict[str, list[float | None]]


class Ring:
    """The newest `capacity` samples. A column that no kept sample has is dropped."""

    def __init__(self, capacity: int, most_columns: int = _MOST_COLUMNS) -> None:
        self._capacity = capacity
        self._most_columns = most_columns
        self._at = array("d", bytes(8 * capacity))
        self._columns: dict[str, array[float]] = {}
        self._last: dict[str, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return min(self._total, self._capacity)

    @property
    def oldest(self) -> float | None:
        """The time of the oldest sample; None without one."""
        return self._at[self._place(0)] if self._total else None

    def add(self, at: float, values: Values) -> None:
        """Add a sample, which is newer than all others."""
        assert not self._total or at > self._at[self._place(len(self) - 1)], "samples come in order"
        place = self._total % self._capacity
        self._at[place] = at
        for name in values:
            if name not in self._columns:
                self._make_column(name)
        for name, column in self._columns.items():
            column[place] = values.get(name, math.nan)
            if name in values:
                self._last[name] = self._total
        self._total += 1

    def table(self, after: float, most: int) -> Table:
        """The samples after a time; if they are more than `most`, every second or third of them, and so on."""
        places = [place for number in range(len(self)) if self._at[place := self._place(number)] > after]
        step = max(1, math.ceil(len(places) / most))
        # Counted from the end: the newest sample is always among them.
        places = places[(len(places) - 1) % step :: step] if places else []
        found: Table = {"at": [round(self._at[place], 3) for place in places]}
        for name, column in self._columns.items():
            found[name] = _shown(column, places)
        return found

    @property
    def size(self) -> int:
        """The bytes of all arrays."""
        return sum(len(column) * column.itemsize for column in (self._at, *self._columns.values()))

    def audit(self) -> None:
        """Raises AssertionError if a bound is broken or the samples are not in order."""
        assert len(self._columns) <= self._most_columns
        assert self._columns.keys() == self._last.keys()
        assert all(len(column) == self._capacity for column in self._columns.values())
        assert len(self._at) == self._capacity
        times = [self._at[self._place(number)] for number in range(len(self))]
        assert all(earlier < later for earlier, later in itertools.pairwise(times))

    def _place(self, number: int) -> int:
        """Where the sample of that number is, counted from the oldest."""
        return (self._total - len(self) + number) % self._capacity

    def _make_column(self, name: str) -> None:
        gone = [other for other, last in self._last.items() if last < self._total - self._capacity]
        for other in gone:
            del self._columns[other], self._last[other]
        if len(self._columns) < self._most_columns:
            self._columns[name] = array("f", [math.nan]) * self._capacity
            self._last[name] = self._total


class History:
    """All samples of a service: the newest, and averages over a day."""

    def __init__(self) -> None:
        self._full = Ring(FULL_KEPT)
        self._thin = Ring(THIN_KEPT)
        self._bucket = -1
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, at: float, values: Values) -> None:
        """Add a sample, which is newer than all others. `values`: known ones; NaN counts as unknown."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self._full.add(at, known)
        bucket = int(at // THIN_S)
        if bucket != self._bucket:
            self._end_bucket()
            self._bucket = bucket
        for name, value in known.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def after(self, at: float) -> Table:
        """The newest samples after a time."""
        return self._full.table(at, FULL_KEPT)

    def span(self, now: float, seconds: float, most: int) -> Table:
        """The samples of the last `seconds`: all if they are kept, else averages; at most `most`."""
        after = now - seconds
        oldest = self._full.oldest
        # A chart that begins a little later is better than one of averages.
        whole = oldest is None or oldest <= after + max(THIN_S, 0.05 * seconds) or len(self._full) < FULL_KEPT
        return (self._full if whole else self._thin).table(after, most)

    @property
    def size(self) -> int:
        """The bytes of all arrays."""
        return self._full.size + self._thin.size

    def audit(self) -> None:
        """Raises AssertionError if a bound is broken or the samples are not in order."""
        self._full.audit()
        self._thin.audit()
        assert self.size <= MOST_BYTES

    def _end_bucket(self) -> None:
        if self._sums:
            means = {name: total / count for name, (total, count) in self._sums.items()}
            self._thin.add((self._bucket + 0.5) * THIN_S, means)
        self._sums = {}


def _shown(column: Sequence[float], places: Sequence[int]) -> list[float | None]:
    """Four significant digits after the point are enough for a chart, and take a third of the bytes."""
    return [None if math.isnan(value := column[place]) else round(value, 4) for place in places]
