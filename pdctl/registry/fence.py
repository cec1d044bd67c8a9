"""Writes of whoever holds a key: they count while the key is its own, and never late.

A write whose answer was lost may still happen: a member of etcd that was frozen carries it out when it goes on, after
newer writes by others (with etcd 3.4, 4 of 24 writes to a frozen member). So each write depends on the revision of the
holder's key, and after a lost answer the key is written anew before anything else: what is still on its way fails then.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.registry import Delete, Listing, Modified, Put, Registry, Unavailable


class NotOurs(Exception):
    """The key is not ours any more."""


class Fence:
    """Writes for the holder of the key that `own` wrote, in the revision `modified`; `created`: the one it began in."""

    def __init__(self, registry: Registry, own: Put, created: int, modified: int) -> None:
        self._registry = registry
        self._own = own
        self._created = created
        self._modified = modified
        self._is_unsure = False

    @property
    def is_unsure(self) -> bool:
        """Whether an answer was lost: a write may have happened, or happen later."""
        return self._is_unsure

    async def write(self, writes: Sequence[Put | Delete]) -> None:
        """Make all writes at once. Raises NotOurs, LeaseGone, Unavailable; after the last, `settle` comes first."""
        assert not self._is_unsure, "settle first"
        self._is_unsure = True
        written = await self._registry.write(writes, [Modified(self._own.key, self._modified)])
        self._is_unsure = False
        if written is None:
            raise NotOurs(f"{self._own.key} is not ours any more")

    async def settle(self, prefix: str) -> Listing:
        """Make sure that no earlier write happens from now on, and look what has, under `prefix`. Raises as `write`
        does."""
        found = await self._registry.list(self._own.key)
        held = next((entry for entry in found.entries if entry.key == self._own.key), None)
        if held is None or held.created != self._created:
            raise NotOurs(f"{self._own.key} is not ours any more")
        modified = await self._registry.write([self._own], [Modified(self._own.key, held.modified)])
        if modified is None:
            raise Unavailable(f"{self._own.key} changed while it was written")
        self._modified = modified
        found = await self._registry.list(prefix)
        # Not before: until then nobody knows what there is.
        self._is_unsure = False
        return found
