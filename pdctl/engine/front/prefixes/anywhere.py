"""Which blocks this engine has in any memory of its own: the pool, or the host's memory beside it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from pdctl.engine.front.kv_events import short
from pdctl.engine.ipc.messages import KvChange, KvStored


class Anywhere:
    """Blocks by their short names. A block that leaves one memory, and is in the other, has not gone."""

    def __init__(self) -> None:
        self._in_pool: set[int] = set()
        self._beside: set[int] = set()

    def has(self, name: int) -> bool:
        """Whether it is in one of them."""
        return name in self._in_pool or name in self._beside

    def pool_changed(self, changes: Iterable[KvChange]) -> list[tuple[int, bool]]:
        """Changes of the pool, in order. Returns blocks that came (True) or went, in order."""
        found: list[tuple[int, bool]] = []
        for change in changes:
            found += self._changed(map(short, change.names), isinstance(change, KvStored), self._in_pool, self._beside)
        return found

    def beside_changed(self, came: Iterable[bytes], went: Iterable[bytes]) -> list[tuple[int, bool]]:
        """Changes of the memory beside the pool; see `pool_changed`."""
        gone = self._changed(map(short, went), False, self._beside, self._in_pool)
        return [*gone, *self._changed(map(short, came), True, self._beside, self._in_pool)]

    def _changed(
        self, names: Iterable[int], is_stored: bool, here: set[int], other: set[int]
    ) -> list[tuple[int, bool]]:
        found = []
        for name in names:
            if (name in here) != is_stored:
                (here.add if is_stored else here.discard)(name)
                if name not in other:
                    found.append((name, is_stored))
        return found
