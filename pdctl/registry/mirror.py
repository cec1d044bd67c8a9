"""A copy of all entries under one prefix, kept up to date: list, then watch, and list again when the watch breaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Never

from pdctl.registry import Behind, Change, Entry, Listing, Registry, Unavailable

# Pauses after a failure, seconds: doubled from the first to the longest, with jitter.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


class Mirror:
    """The copy. Pure: `take` and `replace` return what has changed by them."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0

    def replace(self, listing: Listing) -> tuple[Change, ...]:
        """The copy becomes `listing`."""
        new = {entry.key: entry for entry in listing.entries}
        gone = [Change(key, None, listing.revision) for key in self.entries if key not in new]
        put = [Change(key, entry, entry.modified) for key, entry in new.items() if self.entries.get(key) != entry]
        self.entries, self.revision = new, max(self.revision, listing.revision)
        return tuple(gone + put)

    def take(self, changes: tuple[Change, ...]) -> tuple[Change, ...]:
        """Apply changes. Those that are older than what is held already, as a slow watch tells them, change nothing."""
        news = tuple(change for change in changes if self._is_new(change))
        for change in news:
            if change.entry is None:
                self.entries.pop(change.key, None)
            else:
                self.entries[change.key] = change.entry
            self.revision = max(self.revision, change.revision)
        return news

    def _is_new(self, change: Change) -> bool:
        held = self.entries.get(change.key)
        if held is None:
            return change.entry is not None and change.revision > self.revision
        return change.revision > held.modified


async def follow(
    registry: Registry,
    prefix: str,
    tell: Callable[[tuple[Change, ...]], None],
    state: Callable[[str | None], None],
    mirror: Mirror | None = None,
) -> Never:
    """Tell what changes under `prefix`, from what is there now on, for ever.

    `state` is told None whenever the copy is known to be up to date, else why it may not be: entries stay as they were.
    `mirror`: of whoever follows again after Refused, and must hear what was deleted meanwhile. Raises Refused.
    """
    mirror, failures = mirror or Mirror(), 0
    clock = asyncio.get_running_loop().time
    while True:
        begun = clock()
        try:
            changes = mirror.replace(await registry.list(prefix))
            state(None)
            tell(changes)
            await registry.watch(prefix, mirror.revision, lambda changes: tell(mirror.take(changes)))
        except (Behind, Unavailable) as failure:
            state(str(failure))
        failures = 0 if clock() - begun > _LONGEST_PAUSE_S else failures + 1
        await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret


def pause_s(failures: int, chance: float) -> float:
    """How long to wait after so many failures before; `chance` is in [0, 1): half of the pause is jitter."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 10)) * (0.5 + 0.5 * chance)
