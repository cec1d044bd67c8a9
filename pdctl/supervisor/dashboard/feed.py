"""The newest events of a service: those of the journal's end, and what is added."""

from __future__ import annotations

from collections import deque
from itertools import islice

import msgspec

from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.journal_reader import JournalReader

KEPT = 300


class Feed:
    """Events by number, oldest first; each is a line of the journal."""

    def __init__(self, journal: Journal) -> None:
        self._reader = JournalReader.near_end(journal.folder)
        self._kept: deque[msgspec.Raw] = deque(maxlen=KEPT)
        self._total = 0

    @property
    def total(self) -> int:
        """How many there were."""
        return self._total

    def read(self) -> None:
        """Take what is new in the journal."""
        while entries := self._reader.read():
            for entry in entries:
                self._kept.append(msgspec.Raw(entry.line))
                self._total += 1

    def after(self, number: int) -> tuple[msgspec.Raw, ...]:
        """Those after the first `number`, as far as they are kept."""
        first = self._total - len(self._kept)
        return tuple(islice(self._kept, max(0, number - first), None))
