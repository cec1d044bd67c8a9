"""A supervisor as a part of a cluster: it tells the registry of its engines, follows those of other nodes, and obeys
the orders for its node. Without the registry everything goes on as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import msgspec

from pdctl import __version__
from pdctl.errors import first_of
from pdctl.host.boot import boot_id
from pdctl.host.facts import encode_facts
from pdctl.net.identity import identity_for
from pdctl.plan import Plan
from pdctl.registry import Refused, Registry
from pdctl.supervisor.agent.contact import Contact
from pdctl.supervisor.agent.directory import Directory
from pdctl.supervisor.agent.drains import calls_elsewhere, calls_route
from pdctl.supervisor.agent.examiner import Examiner
from pdctl.supervisor.agent.orders import Orders
from pdctl.supervisor.agent.plans import Planner, engines_of, this_node
from pdctl.supervisor.agent.publishing import Publisher
from pdctl.supervisor.agent.sharing import SPENT_PATH, Sharing
from pdctl.supervisor.agent.turns import Turns
from pdctl.supervisor.cluster.coordinator import Coordinator
from pdctl.supervisor.cluster.entries import EngineEntry, Keys, NodeEntry
from pdctl.supervisor.cluster.membership import Membership
from pdctl.supervisor.cluster.neighbours import Neighbours
from pdctl.supervisor.cluster.presence import Presence
from pdctl.supervisor.service.running import RunningService
from pdctl.supervisor.surface.cluster.agents import AgentAddress
from pdctl.supervisor.surface.cluster.control import ClusterControl
from pdctl.supervisor.surface.cluster.examine import Examinations
from pdctl.supervisor.surface.cluster.merge import ClusterFacts
from pdctl.supervisor.surface.cluster.server import serve_agents
from pdctl.supervisor.surface.controlled import Controlled
from pdctl.topology.spec import Cluster

# After a refusal, which only an administrator can end, seconds.
_REFUSED_S = 5.0
_LEAVE_S = 3.0
# A node that is gone is shown for so long, seconds.
_SHOWN_S = 3600.0


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """`node`: its name; `address`: where it listens; `empty`: its plan without processes; `state_dir`: what outlives a
    run; `allow_commands`: see Planner."""

    cluster: Cluster
    node: str
    address: str
    secret: str
    empty: Plan
    state_dir: Path
    allow_commands: bool = False


class Agent:
    """See ClusterSide. `say(process, message)` is called for what an operator should know. Raises PdctlError if the
    node's certificate cannot be used."""

    def __init__(self, settings: AgentSettings, registry: Registry, say: Callable[[str, str], None]) -> None:
        self.secret = settings.secret
        self.contact = Contact()
        self.refused_order: str | None = None
        self._settings = settings
        self._say = say
        cluster, node = settings.cluster, settings.node
        keys = Keys(settings.empty.service, cluster.cell_of(node))
        folder = cluster.certificates
        self._identity = identity_for(folder, settings.empty.service, node) if folder else None
        self.tls = self._identity.client_context if self._identity is not None else None
        planner = Planner(node, settings.address, cluster, settings.empty, settings.allow_commands, say)
        self._running: RunningService | None = None
        self._control: ClusterControl | None = None
        self._has_left = False
        self._examinations: Examinations | None = None
        self._registry = registry
        self.presence = Presence(registry, keys, self._entry(), cluster.ttl_s, self._engines, self._hears("presence"))
        self.neighbours = Neighbours(
            registry, keys, Membership(node, cluster.node_lost_s), self._ask, self._release, self._changed,
            self._hears("engines"),
        )  # fmt: skip
        turns = Turns(registry, keys, node, cluster.ttl_s, lambda other: say("pdctl", f"node {other} restarts first"))
        self.orders = Orders(
            registry, keys, node, planner.plan_of, self._told_of_order, self._hears("orders"), turns,
            settings.state_dir,
        )  # fmt: skip
        self.coordinator = Coordinator(
            registry, keys, node, cluster, lambda message: say("pdctl", message), self._hears("coordinator")
        )
        self.directory = Directory(registry, keys, node, _SHOWN_S, self._hears("nodes"))
        self.publisher = Publisher(registry, keys, settings.empty.service, planner, self._service)

    # -- see ClusterSide -----------------------------------------------------------------------------------

    def used(self) -> tuple[EngineEntry, ...]:
        """See ClusterSide."""
        return self.neighbours.used

    def engines_changed(self) -> None:
        """See ClusterSide."""
        self.presence.changed()

    async def calls_elsewhere(self, engine: str) -> int:
        """See ClusterSide."""
        return await calls_elsewhere(self._control.agents, engine) if self._control is not None else 0

    def control(self, running: RunningService) -> Controlled:
        """See ClusterSide."""
        settings = self._settings
        own = AgentAddress(settings.node, settings.address, settings.cluster.agent_port, version=__version__)
        control = ClusterControl(
            running, own, self.directory.others, self.secret, self._facts, self.publisher, self.tls
        )
        examiner = Examiner(
            settings.node, settings.address, settings.cluster, settings.allow_commands, lambda: running.plan
        )
        self._examinations = Examinations(examiner, settings.node, control.agents)
        control.more = self._examinations.routes()
        self._control = control
        return control

    async def run_forever(self, running: RunningService) -> Never:
        """Be a part of the cluster until cancelled."""
        self._running = running
        assert self._control is not None, "the control API is made first"
        keys = Keys(self._settings.empty.service)
        node, agents = self._settings.node, self._control.agents
        sharing = Sharing(self._registry, keys, node, running, agents, self._hears("quarantine"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sharing.limits.run_forever())
            tasks.create_task(self._always("quarantine", sharing.quarantine.run_forever))
            tasks.create_task(self._always("presence", self.presence.run_forever))
            tasks.create_task(self._always("engines", self.neighbours.run_forever))
            tasks.create_task(self._always("orders", lambda: self.orders.run_forever(running)))
            tasks.create_task(self._always("coordinator", self.coordinator.run_forever))
            tasks.create_task(self._always("nodes", self.directory.run_forever))
            tasks.create_task(self._serve(running, sharing))
        raise AssertionError("all tasks run for ever")

    async def leave(self) -> None:
        """See ClusterSide."""
        self._has_left = True
        if self._control is not None:
            self._control.close()
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self.coordinator.leave()
                await self.presence.leave()
        except (TimeoutError, Refused):
            self._say("pdctl", "the registry was not told that this node stops: its lease ends by itself")

    # -- parts ---------------------------------------------------------------------------------------------

    async def _always(self, part: str, run: Callable[[], Awaitable[Never]]) -> None:
        """Run a part again when the registry refuses: engines must not stop because a permission is missing.

        Python 3.11's task groups lose a cancellation that comes as a task fails: a node that leaves ends here, too.
        """
        while not self._has_left:
            try:
                await run()
            except* Refused as failures:
                self._hears(part)(str(first_of(failures)))
            await asyncio.sleep(_REFUSED_S)

    async def _serve(self, running: RunningService, sharing: Sharing) -> Never:
        """Answer the agents of other nodes. Raises PdctlError if the address is taken."""
        settings = self._settings
        assert self._examinations is not None, "the control API is made first"
        await serve_agents(
            settings.address,
            settings.cluster.agent_port,
            running,
            self.publisher,
            self.secret,
            self._identity,
            reports={SPENT_PATH: sharing.limits.report},
            more=[*self._examinations.node_routes(), calls_route(running.proxies.own_calls_at)],
        )
        raise AssertionError("it serves until it is cancelled")

    def _service(self) -> RunningService:
        assert self._running is not None, "the control API is served by a running service"
        return self._running

    def _facts(self) -> ClusterFacts:
        """What this node knows of its cluster."""
        order = self.orders.newest
        places = dict.fromkeys(engines_of(order.topology) if order is not None else (), "")
        places |= {entry.name: entry.node for entry in self.neighbours.used if entry.name in places}
        own = order.engines if order is not None else ()
        places |= {name: self._settings.node for name in own if name in places}
        if self._settings.cluster.cells:
            # Engines of other cells are known to their nodes only.
            places = {name: node for name, node in places.items() if node}
        said = self.coordinator.placement
        problem = "; ".join(filter(None, (said.problem, said.hint))) if said is not None else ""
        return ClusterFacts(self.contact.status, self.coordinator.holder or "", places, problem)

    def _hears(self, part: str) -> Callable[[str | None], None]:
        def told(reason: str | None) -> None:
            if not self.contact.told(part, reason):
                return
            if reason is None:
                self._say("pdctl", "etcd answers again")
            else:
                self._say("pdctl", f"etcd is not heard: {reason}; nothing changes until it is")

        return told

    def _told_of_order(self, reason: str | None) -> None:
        if reason and reason != self.refused_order:
            self._say("pdctl", f"the order for this node is not carried out: {reason}")
        self.refused_order = reason

    def _entry(self) -> NodeEntry:
        settings = self._settings
        return NodeEntry(
            name=settings.node,
            address=settings.address,
            boot=boot_id(),
            pdctl=__version__,
            agent_port=settings.cluster.agent_port,
            facts=msgspec.Raw(encode_facts(this_node(settings.address))),
            cell=settings.cluster.cell_of(settings.node),
        )

    def _engines(self) -> list[EngineEntry]:
        return self._running.engines() if self._running is not None else []

    async def _ask(self, entry: EngineEntry) -> str | None:
        return await self._running.epoch_of(entry) if self._running is not None else None

    def _release(self, holders: list[str]) -> None:
        if self._running is not None:
            self._running.others.release(holders)

    def _changed(self) -> None:
        if self._running is not None:
            self._running.others.changed()
