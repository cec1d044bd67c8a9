"""The control interface of an engine kind: the supervisor's calls to a running engine.

A kind declares its abilities. Callers check these, never the kind's name, and make no call that it does not support.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

from pdctl.net.http_client import ConnectionPool
from pdctl.net.internal_calls import Caller
from pdctl.wire import EngineState, LeaseReply, LinkInfo, PeerAddress


class Ability(Enum):
    """What engines of a kind can do for the supervisor."""

    STATE = "report their blocks, leases and links"
    LINK = "connect to the engines whose KV they will read"
    RELEASE_BY_HOLDER = "end all leases that a dead process held"
    REVOKE = "revoke one lease"
    ROLE = "accept a role while they run"


@dataclass(frozen=True, slots=True)
class Target:
    """One running engine: its connections, and a caller that sends the run's secret."""

    pool: ConnectionPool
    caller: Caller


class Progress(msgspec.Struct, frozen=True):
    """Whether an engine makes progress. Kinds omit what they do not know.

    `running`: requests; `tokens_total`, `steps_total`: since the start; `silent_s`: since the core's last answer.
    """

    running: int = 0
    tokens_total: int = 0
    steps_total: int = 0
    silent_s: float = 0.0


class Control(Protocol):
    """The control interface of an engine kind. Every coroutine raises Unreachable when the call fails.

    `progress_path`: where a GET returns the engine's progress; "" if the kind has no such path.
    """

    abilities: frozenset[Ability]
    progress_path: str

    def progress(self, body: bytes) -> Progress:
        """Parse the answer at `progress_path`. Raises ValueError for anything else."""
        ...

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """Ability.STATE."""
        ...

    async def link(self, reader: Target, peers: list[PeerAddress], timeout_s: float) -> list[LinkInfo]:
        """Ability.LINK: returns one entry per peer."""
        ...

    async def release_holder(self, engine: Target, holder: str, timeout_s: float) -> int:
        """Ability.RELEASE_BY_HOLDER: returns how many leases were ended."""
        ...

    async def revoke(self, engine: Target, lease_id: str, timeout_s: float) -> LeaseReply:
        """Ability.REVOKE."""
        ...

    async def set_role(self, engine: Target, role: str, timeout_s: float) -> None:
        """Ability.ROLE: set the engine's role from now on."""
        ...


class NoControl:
    """A kind that the supervisor can only start, probe and stop."""

    abilities: frozenset[Ability] = frozenset()
    progress_path = ""

    def progress(self, body: bytes) -> Progress:
        """Never called: there is no path."""
        raise AssertionError(f"progress of a kind that reports none: {body[:80]!r}")

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.STATE")

    async def link(self, reader: Target, peers: list[PeerAddress], timeout_s: float) -> list[LinkInfo]:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.LINK")

    async def release_holder(self, engine: Target, holder: str, timeout_s: float) -> int:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.RELEASE_BY_HOLDER")

    async def revoke(self, engine: Target, lease_id: str, timeout_s: float) -> LeaseReply:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.REVOKE")

    async def set_role(self, engine: Target, role: str, timeout_s: float) -> None:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.ROLE")
