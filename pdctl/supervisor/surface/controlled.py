"""What the control API needs of a service, on one machine and in a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never, Protocol

from starlette.routing import Route

from pdctl.control_api import (
    DashboardOrder,
    DashboardReply,
    ExitReport,
    KeysStatus,
    KvStatus,
    LogNames,
    LogPart,
    MeasuredStatus,
    Node,
    Nodes,
    PublishedTopology,
    RoleOrder,
    ServiceStatus,
    TopologyOrder,
    TopologyReply,
    UpgradeOrder,
    Verb,
)
from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.process.logs.parts import log_names, read_part
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.surface.events import EventStreams, Streams
from pdctl.wire import LeaseReply


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where to read a log on; see `read_part`."""

    place: str
    previous: bool
    last: int


class LocalService(Protocol):
    """A service on this machine, or a node's part of one: nothing here waits for another machine."""

    @property
    def plan(self) -> Plan: ...
    @property
    def journal(self) -> Journal: ...
    def status(self) -> ServiceStatus: ...
    async def fresh_status(self) -> MeasuredStatus: ...
    def exits(self) -> tuple[ExitReport, ...]: ...
    async def keys(self) -> KeysStatus: ...
    async def leases(self) -> KvStatus: ...
    async def revoke(self, lease_id: str) -> LeaseReply: ...
    def ask(self, name: str, verb: Verb, drain: bool) -> str: ...
    def change_role(self, name: str, call: RoleOrder) -> str: ...
    async def nodes(self) -> Nodes: ...
    def add_node(self, node: Node) -> str: ...
    def remove_node(self, name: str) -> str: ...
    def show(self, order: DashboardOrder) -> DashboardReply: ...
    def changes(self, wanted: Plan) -> Changes: ...
    def apply(self, wanted: Plan) -> str: ...
    async def upgrade(self, order: UpgradeOrder) -> str: ...
    def stop(self) -> None: ...


class Controlled(Protocol):
    """A service as the control API sees it: what may wait for another machine is awaited.

    `more`: calls that only a cluster has. `ask` and the like return why they are refused, or "". Every method may raise
    PdctlError, as a refusal; `log_part` raises LookupError for a process without a log.
    """

    @property
    def local(self) -> LocalService: ...
    @property
    def more(self) -> Sequence[Route]: ...
    def streams(self) -> Streams: ...
    async def status(self) -> ServiceStatus: ...
    async def fresh_status(self) -> MeasuredStatus: ...
    async def exits(self) -> tuple[ExitReport, ...]: ...
    async def keys(self) -> KeysStatus: ...
    async def log_names(self) -> LogNames: ...
    async def log_part(self, name: str, place: LogPlace) -> LogPart: ...
    async def leases(self) -> KvStatus: ...
    async def revoke(self, lease_id: str) -> LeaseReply: ...
    async def ask(self, name: str, verb: Verb, drain: bool) -> str: ...
    async def change_role(self, name: str, call: RoleOrder) -> str: ...
    async def changes(self, wanted: Plan) -> Changes: ...
    async def apply(self, wanted: Plan) -> str: ...
    async def topology(self) -> PublishedTopology: ...
    async def publish(self, order: TopologyOrder) -> TopologyReply: ...
    async def withdraw(self) -> str: ...


class OneMachine:
    """A service that runs on this machine alone; or of a cluster, only what this node runs."""

    more: Sequence[Route] = ()

    def __init__(self, local: LocalService) -> None:
        self.local = local

    def streams(self) -> Streams:
        """This machine's events."""
        return EventStreams(self.local.journal)

    async def status(self) -> ServiceStatus:
        """The status without measurements."""
        return self.local.status()

    async def fresh_status(self) -> MeasuredStatus:
        """The status with measurements."""
        return await self.local.fresh_status()

    async def exits(self) -> tuple[ExitReport, ...]:
        """The last exits."""
        return self.local.exits()

    async def keys(self) -> KeysStatus:
        """The API keys."""
        return await self.local.keys()

    async def log_names(self) -> LogNames:
        """The processes that have logs."""
        return LogNames(names={"": log_names(self.local.journal.folder)})

    async def log_part(self, name: str, place: LogPlace) -> LogPart:
        """A piece of a log."""
        return await asyncio.to_thread(
            read_part, self.local.journal.folder, name, place.place, place.previous, place.last
        )

    async def leases(self) -> KvStatus:
        """Blocks and leases."""
        return await self.local.leases()

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Revoke a lease."""
        return await self.local.revoke(lease_id)

    async def ask(self, name: str, verb: Verb, drain: bool) -> str:
        """Execute a verb on one process."""
        return self.local.ask(name, verb, drain)

    async def change_role(self, name: str, call: RoleOrder) -> str:
        """Give an engine another role."""
        return self.local.change_role(name, call)

    async def changes(self, wanted: Plan) -> Changes:
        """The changes that `apply` would make."""
        return self.local.changes(wanted)

    async def apply(self, wanted: Plan) -> str:
        """Start to apply a plan."""
        return self.local.apply(wanted)

    async def topology(self) -> PublishedTopology:
        """Refused."""
        self._refuse()

    async def publish(self, order: TopologyOrder) -> TopologyReply:
        """Refused."""
        self._refuse()

    async def withdraw(self) -> str:
        """Refused."""
        self._refuse()

    def _refuse(self) -> Never:
        name = self.local.plan.service
        raise PdctlError(
            f"service {name!r} runs on this machine alone, so no topology is published",
            "change it with: pdctl apply    or give its topology a [cluster] and start: pdctl agent",
        )
