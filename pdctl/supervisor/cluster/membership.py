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
    """The engines of other nodes than `node`, by registry key. `lost_s`: seconds until an unknown one is forgotten;
    `version` counts the changes of `used`."""

    def __init__(self, node: str, lost_s: float) -> None:
        self.version = 0
        self._node = node
        self._lost_s = lost_s
        self._present: dict[str, EngineEntry] = {}
        self._unknown: dict[str, _Unknown] = {}
        # Of engines that are or were unknown: their keys, by node and name.
        self._keys: dict[tuple[str, str], str] = {}
        self._used: tuple[int, tuple[EngineEntry, ...]] = (0, ())

    def take(self, changes: Iterable[Change], now: float) -> list[str]:
        """News from the registry. Returns the holders whose leases are to be released."""
        released: list[str] = []
        unknown = len(self._unknown)
        for change in changes:
            entry = engine_of(change.entry) if change.entry is not None else None
            if change.entry is None:
                self._vanished(change.key, now)
            elif entry is not None and entry.node != self._node:
                released += self._said(change.key, entry)
        if len(self._unknown) > unknown:
            self._see_mass(now)
        return released

    def asked(self, entry: EngineEntry, epoch: str | None) -> list[str]:
        """An unknown engine was asked directly: its epoch, or None if it did not answer. Returns holders to release."""
        key = self._keys.get((entry.node, entry.name), "")
        if (unknown := self._unknown.get(key)) is None:
            return []
        if epoch is not None and epoch != unknown.entry.epoch:
            # It was started again: the new one is used when its node tells of it.
            del self._unknown[key], self._keys[entry.node, entry.name]
            self.version += unknown.answers
            return [unknown.entry.holder]
        before, unknown.answers = unknown.answers, epoch is not None or unknown.in_mass
        self.version += before != unknown.answers
        return [unknown.entry.holder] if before and not unknown.answers else []

    def forget(self, now: float) -> list[str]:
        """Drop engines that have been unknown for too long. Returns holders to release."""
        lost = [key for key, unknown in self._unknown.items() if now - unknown.since >= self._lost_s]
        dropped = [self._unknown.pop(key).entry for key in lost if not self._unknown[key].answers]
        held = [self._unknown.pop(key).entry for key in lost if key in self._unknown]
        for entry in (*dropped, *held):
            del self._keys[entry.node, entry.name]
        self.version += bool(held)
        return [entry.holder for entry in held]

    @property
    def used(self) -> tuple[EngineEntry, ...]:
        """Engines that may get requests, or that drain; by name."""
        if self._used[0] != self.version:
            unknown = [unknown.entry for unknown in self._unknown.values() if unknown.answers]
            found = sorted([*self._present.values(), *unknown], key=lambda entry: entry.name)
            self._used = self.version, tuple(found)
        return self._used[1]

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
        unknown = {(unknown.entry.node, unknown.entry.name): key for key, unknown in self._unknown.items()}
        assert unknown == self._keys, "an unknown engine cannot be found by its name"

    def _said(self, key: str, entry: EngineEntry) -> list[str]:
        """A node tells of its engine. Another epoch than before means that the earlier start has ended."""
        unknown = self._unknown.pop(key, None)
        if unknown is not None:
            del self._keys[unknown.entry.node, unknown.entry.name]
        before = self._present.pop(key, None) or (unknown.entry if unknown is not None else None)
        if entry.state != GONE:
            self._present[key] = entry
        was = before if unknown is None or unknown.answers else None
        self.version += was != (entry if entry.state != GONE else None)
        ended = before is not None and (entry.state == GONE or entry.epoch != before.epoch)
        return [before.holder] if before is not None and ended else []

    def _vanished(self, key: str, now: float) -> None:
        entry = self._present.pop(key, None)
        if entry is not None:
            self._unknown[key] = _Unknown(entry, now)
            self._keys[entry.node, entry.name] = key

    def _see_mass(self, now: float) -> None:
        fresh = [unknown for unknown in self._unknown.values() if now - unknown.since < _MASS_S]
        nodes = {unknown.entry.node for unknown in fresh}
        # The engines of one node vanish together when that node is lost.
        if len(nodes) > 1 and len(fresh) > _MASS_PART * (len(self._present) + len(self._unknown)):
            for unknown in fresh:
                unknown.in_mass = True
