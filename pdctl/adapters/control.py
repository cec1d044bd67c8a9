"""The control interface of an engine kind: the supervisor's calls to a running engine.

A kind declares its abilities. Callers check these, never the kind's name, and make no call that it does not support.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

from pdctl.net.http_client import ConnectionPool
from pdctl.net.internal_calls import Caller
from pdctl.wire import EngineState, LeaseReply, LinkInfo, PeerAddress, RoleCall


class Ability(Enum):
    """What engines of a kind can do for the supervisor."""

    STATE = "report their blocks, leases and links"
    LINK = "connect to the engines whose KV they will read"
    RELEASE_BY_HOLDER = "end all leases that a dead process held"
    REVOKE = "revoke one lease"
    ROLE = "accept a role while they run"
    NEIGHBOURS = "fetch beginnings of prompts from each other"
    SWEEP = "free the KV that requests have left, when none of them needs it any more"


@dataclass(frozen=True, slots=True)
class Target:
    """One running engine: its connections, and a caller that sends the run's secret."""

    pool: ConnectionPool
    caller: Caller


class Peer(NamedTuple):
    """An engine whose KV another one will read: its address, and how the supervisor reaches it."""

    address: PeerAddress
    target: Target


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

    `progress_path`: where a GET returns the engine's progress; "" if the kind has no such path. `start_path`: where a
    GET returns something that differs between two starts of an engine that pdctl did not start; "" if nobody needs it.
    `links_hybrids`: hybrid engines are linked too.
    """

    abilities: frozenset[Ability]
    progress_path: str
    start_path: str
    links_hybrids: bool

    def progress(self, body: bytes) -> Progress:
        """Parse the answer at `progress_path`. Raises ValueError for anything else."""
        ...

    def start_of(self, body: bytes) -> str:
        """What identifies this start of the engine, from the answer at `start_path`; "" if it does not say."""
        ...

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """Ability.STATE."""
        ...

    async def link(self, reader: Target, peers: list[Peer], timeout_s: float) -> list[LinkInfo]:
        """Ability.LINK: returns one entry per peer."""
        ...

    async def release_holder(self, engine: Target, holder: str, timeout_s: float) -> int:
        """Ability.RELEASE_BY_HOLDER: returns how many leases were ended."""
        ...

    async def revoke(self, engine: Target, lease_id: str, timeout_s: float) -> LeaseReply:
        """Ability.REVOKE."""
        ...

    async def set_role(self, engine: Target, role: RoleCall, timeout_s: float) -> None:
        """Ability.ROLE: set the engine's role from now on."""
        ...

    async def meet(self, engine: Target, others: list[PeerAddress], timeout_s: float) -> None:
        """Ability.NEIGHBOURS: these other engines run now."""
        ...

    async def unlink(self, reader: Target, peer: Peer, timeout_s: float) -> None:
        """Ability.LINK: end the link on both sides. It is no error if an engine does not answer or has no such link."""
        ...

    async def sweep(self, engine: Target, swept: int, sent: int, timeout_s: float) -> int:
        """Ability.SWEEP: free everything that requests have left in an engine without a running request.

        `swept`: the last answer, 0 at first; `sent`: how many requests the callers know of. Returns how many are swept.
        """
        ...


class NoControl:
    """A kind that the supervisor can only start, probe and stop."""

    abilities: frozenset[Ability] = frozenset()
    progress_path = ""
    start_path = ""
    links_hybrids = True

    def progress(self, body: bytes) -> Progress:
        """Never called: there is no path."""
        raise AssertionError(f"progress of a kind that reports none: {body[:80]!r}")

    def start_of(self, body: bytes) -> str:
        """Never called: there is no path."""
        raise AssertionError(f"start of a kind that does not tell it: {body[:80]!r}")

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.STATE")

    async def link(self, reader: Target, peers: list[Peer], timeout_s: float) -> list[LinkInfo]:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.LINK")

    async def release_holder(self, engine: Target, holder: str, timeout_s: float) -> int:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.RELEASE_BY_HOLDER")

    async def revoke(self, engine: Target, lease_id: str, timeout_s: float) -> LeaseReply:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.REVOKE")

    async def set_role(self, engine: Target, role: RoleCall, timeout_s: float) -> None:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.ROLE")

    async def meet(self, engine: Target, others: list[PeerAddress], timeout_s: float) -> None:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.NEIGHBOURS")

    async def unlink(self, reader: Target, peer: Peer, timeout_s: float) -> None:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.LINK")

    async def sweep(self, engine: Target, swept: int, sent: int, timeout_s: float) -> int:
        """Never called: see `abilities`."""
        raise AssertionError("a kind without Ability.SWEEP")
