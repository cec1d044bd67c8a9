"""What each proxy worker has taken from the limits of API keys, in memory shared by all workers."""

from __future__ import annotations

import time
from hashlib import blake2s
from pathlib import Path

from pdctl.proxy.shares.limits import NOTHING, Levels, Totals
from pdctl.proxy.shares.shared_memory import shared_memory

# Keys with limits that workers count together. Further ones are counted by each worker alone.
_MAX_KEYS = 1024
# Numbers per worker before those of its keys: how many keys, and when it was started.
_HEAD = 2
# Numbers per key: its id, requests, tokens, answers now, levels of requests and tokens, and when these were so.
_NUMBERS = 7


class SharedTotals:
    """One part per worker: the number of its keys, its start, then the numbers of each key. Each worker writes only its
    own part. A number that is being written is read either before or after the write."""

    def __init__(self, path: Path, workers: int, worker: int) -> None:
        self._width = _HEAD + _MAX_KEYS * _NUMBERS
        size = workers * self._width * 8
        self._table = memoryview(shared_memory(path, size)).cast("d")
        self._own: dict[str, int] = {}
        self._start = worker * self._width
        self._others = [_Reader(self._table, other * self._width) for other in range(workers) if other != worker]
        # Clear the totals of a previous start of this worker.
        self._table[self._start : self._start + self._width] = memoryview(bytes(self._width * 8)).cast("d")
        self._table[self._start + 1] = time.monotonic()

    def meet(self, key: str, now: float) -> list[Levels]:
        """Begin to count a key: `others` tells from now on what is taken. Returns where each of the others is."""
        return [levels for reader in self._others if (levels := reader.meet(key, now)) is not None]

    def publish(self, key: str, totals: Totals, levels: Levels, now: float) -> None:
        """Write what this worker has taken since its start."""
        at = self._own.get(key)
        table = self._table
        if at is None:
            count = len(self._own)
            if count == _MAX_KEYS:
                return
            at = self._own[key] = self._start + _HEAD + count * _NUMBERS
            table[at] = _id_of(key)
            table[self._start] = count + 1.0
        table[at + 1], table[at + 2], table[at + 3] = totals
        table[at + 4], table[at + 5], table[at + 6] = levels.requests, levels.tokens, now

    def others(self, key: str) -> Totals:
        """What the other workers have taken since the last call for this key, and their answers now."""
        found = [reader.news(key) for reader in self._others]
        requests, tokens, streams = (sum(numbers) for numbers in zip(*found, strict=True)) if found else NOTHING
        return Totals(requests, tokens, streams)


class _Reader:
    """Reads another worker's part."""

    def __init__(self, table: memoryview[float], start: int) -> None:
        self._table = table
        self._start = start
        self._began = 0.0
        self._places: dict[float, int] = {}
        self._before: dict[str, Totals] = {}

    def meet(self, key: str, now: float) -> Levels | None:
        """Count from here on. Returns the other worker's levels, None if it does not have this key."""
        place = self._place(key)
        if place is None:
            return None
        self._before[key] = Totals(self._table[place + 1], self._table[place + 2])
        requests, tokens, at = (self._table[place + number] for number in (4, 5, 6))
        return Levels(requests, tokens, max(0.0, now - at))

    def news(self, key: str) -> Totals:
        place = self._place(key)
        if place is None:
            return NOTHING
        requests, tokens, streams = (self._table[place + number] for number in (1, 2, 3))
        before = self._before.get(key, NOTHING)
        self._before[key] = Totals(requests, tokens)
        return Totals(requests - before.requests, tokens - before.tokens, streams)

    def _place(self, key: str) -> int | None:
        count, began = int(self._table[self._start]), self._table[self._start + 1]
        if began != self._began:
            # The worker was started again: it counts from zero.
            self._began = began
            self._places.clear()
            self._before.clear()
        for number in range(len(self._places), count):
            at = self._start + _HEAD + number * _NUMBERS
            self._places[self._table[at]] = at
        return self._places.get(_id_of(key))


def _id_of(key: str) -> float:
    """48 bits of a hash, which a float can hold."""
    return float(int.from_bytes(blake2s(key.encode(), digest_size=6).digest()))
