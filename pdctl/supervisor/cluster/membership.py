"""What a node believes of the engines of other nodes. Pure: news and times in, beliefs and orders out.

The registry says three things of an engine. Present: it is used. Gone, by its own node: it is dropped, and its leases
are released, at once. Nothing more (the lease of its node has ended): nobody knows, so it is asked directly, and used
while it answers. One that does not answer leaves the routing, its leases are released, and it is forgotten later.

Many engines that vanish at one instant are the registry's fault, not theirs: then nothing is released, and all are used
until they are known again or forgotten. Releasing the leases of a reader that lives costs it one prefill, and never a
token: its COMMIT is answered by the table that was told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pdctl.registry import Change
from pdctl.supervisor.cluster.entries import GONE, EngineEntry, engine_of

# More than this part of all engines that vanish within so many seconds: the registry's fault.
_MASS_PART, _MASS_S = 1 / 3, 1.0


@dataclass(slots=True)
class _Unknown:
    """An engine of which the registry tells nothing any more. `answers`: it did so, asked directly."""

    entry: EngineEntry
    since: float
    answers: bool = True
    in_mass: bool = False


class Membership:
    """The engines of other nodes than `node`, by registry key. `lost_s`: seconds until an unknown one is forgotten."""

    def __init__(self, node: str, lost_s: float) -> None:
        self._node = node
        self._lost_s = lost_s
        self._present: dict[str, EngineEntry] = {}
        self._unknown: dict[str, _Unknown] = {}

    def take(self, changes: Iterable[Change], now: float) -> list[str]:
        """News from the registry. Returns the holders whose leases are to be released."""
        released: list[str] = []
        for change in changes:
            entry = engine_of(change.entry) if change.entry is not None else None
            if change.entry is None:
                self._vanished(change.key, now)
            elif entry is not None and entry.node != self._node:
                released += self._said(change.key, entry)
        self._see_mass(now)
        return released

    def asked(self, entry: EngineEntry, epoch: str | None) -> list[str]:
        """An unknown engine was asked directly: its epoch, or None if it did not answer. Returns holders to release."""
        for key, unknown in list(self._unknown.items()):
            if (unknown.entry.node, unknown.entry.name) != (entry.node, entry.name):
                continue
            if epoch is not None and epoch != unknown.entry.epoch:
                # It was started again: the new one is used when its node tells of it.
                del self._unknown[key]
                return [unknown.entry.holder]
            left = unknown.answers and epoch is None and not unknown.in_mass
            unknown.answers = epoch is not None or unknown.in_mass
            return [unknown.entry.holder] if left else []
        return []

    def forget(self, now: float) -> list[str]:
        """Drop engines that have been unknown for too long. Returns holders to release."""
        lost = [key for key, unknown in self._unknown.items() if now - unknown.since >= self._lost_s]
        dropped = [self._unknown.pop(key) for key in lost]
        return [unknown.entry.holder for unknown in dropped if unknown.answers]

    @property
    def used(self) -> tuple[EngineEntry, ...]:
        """Engines that may get requests, or that drain; by name."""
        unknown = [unknown.entry for unknown in self._unknown.values() if unknown.answers]
        return tuple(sorted([*self._present.values(), *unknown], key=lambda entry: entry.name))

    @property
    def unknown(self) -> tuple[EngineEntry, ...]:
        """Engines to ask directly."""
        return tuple(unknown.entry for unknown in self._unknown.values())

    @property
    def registry_failed(self) -> bool:
        """Whether so many engines vanished at once that the registry is to blame."""
        return any(unknown.in_mass for unknown in self._unknown.values())

    def audit(self) -> None:
        """Check the books: an engine is known or unknown, and none of them is our own."""
        assert not self._present.keys() & self._unknown.keys(), "an engine is both present and unknown"
        entries = [*self._present.values(), *(unknown.entry for unknown in self._unknown.values())]
        assert all(entry.node != self._node and entry.state != GONE for entry in entries)

    def _said(self, key: str, entry: EngineEntry) -> list[str]:
        """A node tells of its engine. Another epoch than before means that the earlier start has ended."""
        unknown = self._unknown.pop(key, None)
        before = self._present.pop(key, None) or (unknown.entry if unknown is not None else None)
        if entry.state != GONE:
            self._present[key] = entry
        ended = before is not None and (entry.state == GONE or entry.epoch != before.epoch)
        return [before.holder] if before is not None and ended else []

    def _vanished(self, key: str, now: float) -> None:
        entry = self._present.pop(key, None)
        if entry is not None:
            self._unknown[key] = _Unknown(entry, now)

    def _see_mass(self, now: float) -> None:
        fresh = [unknown for unknown in self._unknown.values() if now - unknown.since < _MASS_S]
        nodes = {unknown.entry.node for unknown in fresh}
        # The engines of one node vanish together when that node is lost.
        if len(nodes) > 1 and len(fresh) > _MASS_PART * (len(self._present) + len(self._unknown)):
            for unknown in fresh:
                unknown.in_mass = True
