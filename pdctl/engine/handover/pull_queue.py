"""The order of pulls. Only policy: no threads, no clock.

Every peer may always have one running pull, so a slow or dead peer delays no other. More than one per peer is allowed
only while few pulls are running.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class PullQueue(Generic[Item]):
    """Items in order per peer, peers in turn. `per_peer` and `extra` limit concurrent items."""

    def __init__(self, per_peer: int = 2, extra: int = 8) -> None:
        self.per_peer = per_peer
        self.extra = extra
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        self._active: dict[str, int] = {}

    def push(self, peer: str, item: Item) -> None:
        """Queue an item after the peer's other items."""
        self._waiting.setdefault(peer, deque()).append(item)

    def take(self) -> tuple[str, Item] | None:
        """The next item that may run; its peer moves to the end of the order."""
        running = sum(self._active.values())
        for peer, items in self._waiting.items():
            active = self._active.get(peer, 0)
            if active == 0 or (active < self.per_peer and running < self.extra):
                item = items.popleft()
                self._active[peer] = active + 1
                self._waiting.move_to_end(peer)
                if not items:
                    del self._waiting[peer]
                return peer, item
        return None

    def done(self, peer: str) -> None:
        """Record that an item of this peer has ended."""
        self._active[peer] -= 1
        if not self._active[peer]:
            del self._active[peer]

    def drop(self, wanted: Callable[[Item], bool]) -> bool:
        """Remove the first waiting item that matches; False if there is none."""
        for peer, items in self._waiting.items():
            for item in items:
                if wanted(item):
                    items.remove(item)
                    if not items:
                        del self._waiting[peer]
                    return True
        return False

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))
