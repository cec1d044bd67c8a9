"""Where the nodes of a cluster keep what all of them must know: who is there, and what each should run.

Keys and values with revisions and leases, as etcd has them. Two kinds: `memory` (one process) and `etcd`. What a stream
or a KV lease depends on is never kept here: a registry that is down delays news, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Never, Protocol

from pdctl.errors import PdctlError

NO_LEASE = 0


class Unavailable(Exception):
    """No member answered in time. A write may have happened or not."""


class LeaseGone(Exception):
    """The lease has ended, and the keys under it are deleted."""


class Behind(Exception):
    """The changes asked for are forgotten already: list again."""


class Refused(PdctlError):
    """The registry refuses the call: wrong credentials, no permission, no space."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value. `created` and `modified` are revisions; `lease` is NO_LEASE for a key that stays."""

    key: str
    value: bytes
    created: int
    modified: int
    lease: int = NO_LEASE


@dataclass(frozen=True, slots=True)
class Change:
    """`entry` is what `key` is since `revision`; None: it is deleted, by its owner or because its lease ended."""

    key: str
    entry: Entry | None
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix, in the order of their keys, as they were at `revision`."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key."""

    key: str
    value: bytes
    lease: int = NO_LEASE


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key. Nothing happens if it does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class Created:
    """Holds while the revision that created `key` is this one; 0: while it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Modified:
    """Holds while the last change of `key` is of this revision; 0: while it does not exist."""

    key: str
    revision: int


class Registry(Protocol):
    """Every method raises Unavailable within seconds when nobody answers, and Refused for what the user must mend."""

    async def grant(self, ttl_s: int) -> int:
        """A new lease. It ends when it was not kept for `ttl_s` seconds, or some seconds later."""
        ...

    async def keep(self, lease: int) -> None:
        """Renew a lease. Raises LeaseGone."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys. Nothing happens if it has ended."""
        ...

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        """Make all writes at once if all conditions hold. Returns the revision, or None if a condition fails.

        Each key is written at most once. Raises LeaseGone when a lease of a write has ended. After Unavailable, a write
        with conditions may have happened: look before you try again.
        """
        ...

    async def list(self, prefix: str) -> Listing:
        """All entries whose keys begin with `prefix`."""
        ...

    async def watch(self, prefix: str, after: int, tell: Callable[[tuple[Change, ...]], None]) -> Never:
        """Tell the changes under `prefix` with revisions above `after`, in order, those of one revision together.

        Runs until it is cancelled. Raises Behind when changes are forgotten, Unavailable when the registry is lost.
        """
        ...

    async def close(self) -> None:
        """Close all connections. Leases are left to end."""
        ...
