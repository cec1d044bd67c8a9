"""What each proxy worker has taken from the limits of API keys, in memory shared by all workers."""

from __future__ import annotations

import mmap
from hashlib import blake2s
from pathlib import Path

from pdctl.proxy.shares.limits import NOTHING, Totals

# Keys with limits that workers count together. Further ones are counted by each worker alone.
_MAX_KEYS = 1024
# Numbers per key: its id, requests, tokens and answers now.
_NUMBERS = 4


class SharedTotals:
    """One part per worker: the number of its keys, then the numbers of each. Each worker writes only its own part. A
    number that is being written is read either before or after the write."""

    def __init__(self, path: Path, workers: int, worker: int) -> None:
        self._width = 1 + _MAX_KEYS * _NUMBERS
        size = workers * self._width * 8
        with path.open("a+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._table = memoryview(self._memory).cast("d")
        self._own: dict[str, int] = {}
        self._start = worker * self._width
        self._others = [_Reader(self._table, other * self._width) for other in range(workers) if other != worker]
        # Clear the totals of a previous start of this worker.
        self._table[self._start : self._start + self._width] = memoryview(bytes(self._width * 8)).cast("d")

    def publish(self, key: str, totals: Totals) -> None:
        """Write what this worker has taken since its start."""
        at = self._own.get(key)
        table = self._table
        if at is None:
            count = len(self._own)
            if count == _MAX_KEYS:
                return
            at = self._own[key] = self._start + 1 + count * _NUMBERS
            table[at] = _id_of(key)
            table[self._start] = count + 1.0
        table[at + 1], table[at + 2], table[at + 3] = totals

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
        self._places: dict[float, int] = {}
        self._before: dict[str, Totals] = {}

    def news(self, key: str) -> Totals:
        count = int(self._table[self._start])
        if count < len(self._places):
            self._places.clear()  # the worker was restarted
        for number in range(len(self._places), count):
            at = self._start + 1 + number * _NUMBERS
            self._places[self._table[at]] = at
        place = self._places.get(_id_of(key))
        if place is None:
            return NOTHING
        requests, tokens, streams = (self._table[place + number] for number in (1, 2, 3))
        before = self._before.get(key, NOTHING)
        self._before[key] = Totals(requests, tokens)
        if requests < before.requests:
            before = NOTHING  # the worker was restarted: it counts from zero
        return Totals(requests - before.requests, tokens - before.tokens, streams)


def _id_of(key: str) -> float:
    """48 bits of a hash, which a float can hold."""
    return float(int.from_bytes(blake2s(key.encode(), digest_size=6).digest()))
