"""Keys, leases and their history as plain data, with the time given: what the memory registry and simulations use."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import takewhile

from pdctl.registry import NO_LEASE, Behind, Change, Created, Delete, Entry, LeaseGone, Listing, Modified, Put

# Revisions whose changes are remembered for watchers.
_HISTORY = 10_000


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_at: float
    keys: set[str] = field(default_factory=set)


class Store:
    """The books of one registry. Times are seconds of one monotonic clock, and never go back."""

    def __init__(self, history: int = _HISTORY) -> None:
        self.revision = 0
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        # When leases end, and their ids. A lease that was kept is in it several times: only its latest end counts.
        self._ends: list[tuple[float, int]] = []
        self._history: deque[tuple[Change, ...]] = deque(maxlen=history)

    def grant(self, ttl_s: float, now: float) -> int:
        """A new lease."""
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_s, now + ttl_s)
        heappush(self._ends, (now + ttl_s, self._last_lease))
        return self._last_lease

    def keep(self, lease: int, now: float) -> None:
        """Renew a lease. Raises LeaseGone."""
        self.expire(now)
        held = self._lease(lease)
        held.ends_at = now + held.ttl_s
        heappush(self._ends, (held.ends_at, lease))

    def revoke(self, lease: int) -> None:
        """End a lease and delete its keys in one revision."""
        held = self._leases.pop(lease, None)
        if held is not None and held.keys:
            self._commit([Delete(key) for key in sorted(held.keys)])

    def expire(self, now: float) -> None:
        """End the leases that were not kept in time."""
        while (end := self.next_end()) is not None and end <= now:
            self.revoke(self._ends[0][1])

    def next_end(self) -> float | None:
        """When the next lease ends unless it is kept. None: no lease is held."""
        while self._ends:
            end, lease = self._ends[0]
            if (held := self._leases.get(lease)) is not None and held.ends_at == end:
                return end
            heappop(self._ends)
        return None

    def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified]) -> int | None:
        """As `Registry.write`."""
        assert len({write.key for write in writes}) == len(writes), "a key is written twice"
        if not all(self._holds(condition) for condition in conditions):
            return None
        for write in writes:
            if isinstance(write, Put) and write.lease != NO_LEASE:
                self._lease(write.lease)
        self._commit(writes)
        return self.revision

    def listing(self, prefix: str) -> Listing:
        """As `Registry.list`."""
        found = sorted(key for key in self._entries if key.startswith(prefix))
        return Listing(tuple(self._entries[key] for key in found), self.revision)

    def changes(self, prefix: str, after: int) -> list[tuple[Change, ...]]:
        """The changes under `prefix` since revision `after`, one group per revision. Raises Behind."""
        oldest = self._history[0][0].revision if self._history else self.revision + 1
        if after + 1 < oldest and after < self.revision:
            raise Behind(f"revision {after + 1} is forgotten; the oldest is {oldest}")
        # Watchers ask for the newest few of thousands.
        newest = takewhile(lambda group: group[0].revision > after, reversed(self._history))
        seen = [tuple(change for change in group if change.key.startswith(prefix)) for group in newest]
        return [group for group in reversed(seen) if group]

    def audit(self) -> None:
        """Check the books: keys under leases are known to both sides, and revisions are in order."""
        for lease, held in self._leases.items():
            for key in held.keys:
                assert self._entries[key].lease == lease, f"{key} is not under lease {lease}"
        for key, entry in self._entries.items():
            assert entry.key == key
            assert 0 < entry.created <= entry.modified <= self.revision, entry
            assert entry.lease == NO_LEASE or key in self._leases[entry.lease].keys, f"{key} is under no lease"
        revisions = [group[0].revision for group in self._history]
        assert revisions == sorted(set(revisions)), "history is out of order"

    def _lease(self, lease: int) -> _Lease:
        held = self._leases.get(lease)
        if held is None:
            raise LeaseGone(f"lease {lease} has ended")
        return held

    def _holds(self, condition: Created | Modified) -> bool:
        entry = self._entries.get(condition.key)
        if entry is None:
            return condition.revision == 0
        return condition.revision == (entry.created if isinstance(condition, Created) else entry.modified)

    def _commit(self, writes: Sequence[Put | Delete]) -> None:
        revision = self.revision + 1
        changes = tuple(change for write in writes if (change := self._apply(write, revision)) is not None)
        if changes:
            self.revision = revision
            self._history.append(changes)

    def _apply(self, write: Put | Delete, revision: int) -> Change | None:
        old = self._entries.pop(write.key, None)
        if old is not None and old.lease in self._leases:
            self._leases[old.lease].keys.discard(write.key)
        if isinstance(write, Delete):
            return Change(write.key, None, revision) if old is not None else None
        entry = Entry(write.key, write.value, old.created if old else revision, revision, write.lease)
        self._entries[write.key] = entry
        if write.lease != NO_LEASE:
            self._leases[write.lease].keys.add(write.key)
        return Change(write.key, entry, revision)
