"""The bodies that each proxy worker has put in quarantine, in memory shared by all workers."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from pdctl.proxy.shares.shared_memory import shared_memory

DIGEST_BYTES = 16
# A body: its digest, and until when it is refused (monotonic clock).
_BODY = struct.Struct(f"={DIGEST_BYTES}sd")
# At the beginning of a part: how many bodies were ever put there.
_COUNT = struct.Struct("=Q")
# The newest bodies of a worker.
_BODIES = 256


class SharedBodies:
    """One part per worker, which only this worker writes: a count, then a ring of bodies. A part stays when its worker
    is started again: what it found still kills engines."""

    def __init__(self, path: Path, workers: int, worker: int) -> None:
        self._width = _COUNT.size + _BODIES * _BODY.size
        size = workers * self._width
        self._memory = shared_memory(path, size)
        self._starts = [number * self._width for number in range(workers)]
        self._own = self._starts[worker]
        self._seen: list[int] = [0] * workers
        self._known: dict[bytes, float] = {}

    def put(self, digest: bytes, until: float) -> None:
        """Add a body."""
        count = self._count(self._own)
        _BODY.pack_into(self._memory, self._own + _COUNT.size + count % _BODIES * _BODY.size, digest, until)
        # Last: who sees the new count sees the body.
        _COUNT.pack_into(self._memory, self._own, count + 1)

    def bodies(self) -> dict[bytes, float]:
        """Until when each body is refused, of all workers."""
        counts = [self._count(start) for start in self._starts]
        if counts != self._seen:
            self._known = self._read()
            self._seen = counts
        return self._known

    def _read(self) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        now = time.monotonic()
        for start in self._starts:
            begin = start + _COUNT.size
            used = min(self._count(start), _BODIES) * _BODY.size
            for digest, until in _BODY.iter_unpack(self._memory[begin : begin + used]):
                if until > now:
                    found[digest] = max(until, found.get(digest, 0.0))
        return found

    def _count(self, start: int) -> int:
        count: int = _COUNT.unpack_from(self._memory, start)[0]
        return count
