"""The queue of sequences that have no blocks yet, in the order of a policy. Each operation costs O(log n)."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import count

from pdctl.engine.schedule.prompts.policies import Policy, Prompt
from pdctl.engine.schedule.sequence import Sequence


class Rank(IntEnum):
    """What goes before priority and policy."""

    URGENT = 0  # preempted, or passed too often
    OVERDUE = 1  # has waited too long, and it is the turn of one that has
    NORMAL = 2
    LATE = 3  # its deadline cannot be kept any more


# Rank, priority (lower goes first), key of the policy in seconds.
Order = tuple[int, int, float]


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    order: Order


class WaitingQueue:
    """Sequences by request id. Removed ones stay in the heaps until they come up or are too many."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # The numbers make every item different: entries are never compared.
        self._numbers = count()
        self._heap: list[tuple[Order, int, int, _Entry]] = []
        self._changes: list[tuple[float, int, Rank, _Entry]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (entry.sequence for entry in self._entries.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._entries

    def push(self, sequence: Sequence, prompt: Prompt) -> None:
        """Queue a sequence."""
        assert sequence not in self
        rank = Rank.URGENT if sequence.preemptions else Rank.NORMAL
        entry = _Entry(sequence, (rank, sequence.priority, self._policy.key(prompt)))
        self._entries[sequence.request_id] = entry
        self._enqueue(entry)
        if rank is Rank.NORMAL:
            self._change(entry, self._policy.late_from(prompt), Rank.LATE)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._entries[sequence.request_id]
        # Each live entry has at most two items in the first heap and one in the second.
        if len(self._heap) + len(self._changes) > 6 * len(self._entries) + 64:
            self._heap = [item for item in self._heap if self._is_live(item[-1])]
            self._changes = [item for item in self._changes if self._is_live(item[-1])]
            heapq.heapify(self._heap)
            heapq.heapify(self._changes)

    def head(self, now: float) -> Sequence | None:
        """The sequence that goes first now; it stays in the queue."""
        while self._changes and self._changes[0][0] <= now:
            _, _, rank, entry = heapq.heappop(self._changes)
            if self._is_live(entry):
                entry.order = (rank, *entry.order[1:])
                self._enqueue(entry)
        while self._heap:
            order, *_, entry = self._heap[0]
            if self._is_live(entry) and entry.order == order:
                return entry.sequence
            heapq.heappop(self._heap)
        return None

    def longest_waiting(self) -> Sequence | None:
        """The sequence that was queued first."""
        return next(iter(self._entries.values())).sequence if self._entries else None

    def order(self, sequence: Sequence) -> Order:
        """The place of a queued sequence."""
        return self._entries[sequence.request_id].order

    def _enqueue(self, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.order, entry.sequence.arrival, next(self._numbers), entry))

    def _change(self, entry: _Entry, at: float, rank: Rank) -> None:
        heapq.heappush(self._changes, (at, next(self._numbers), rank, entry))

    def _is_live(self, entry: _Entry) -> bool:
        return self._entries.get(entry.sequence.request_id) is entry
