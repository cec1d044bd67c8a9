"""The topology that a cluster runs: read, changed and withdrawn in the registry, for the commands of any node."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from pdctl.control_api import PublishedTopology
from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.registry import Delete, Entry, Modified, Put, Registry, Unavailable
from pdctl.supervisor.agent.plans import Planner
from pdctl.supervisor.cluster.assignments import Assignments, orders_of
from pdctl.supervisor.cluster.coordinator import room_of_node, wanted_of
from pdctl.supervisor.cluster.entries import Keys, Order, TopologyEntry
from pdctl.supervisor.service.running import RunningService
from pdctl.topology.loader import load_cluster_text


class Publisher:
    """See Publishing. `running` returns this node's service."""

    def __init__(
        self, registry: Registry, keys: Keys, service: str, planner: Planner, running: Callable[[], RunningService]
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._service = service
        self._planner = planner
        self._running = running

    async def topology(self) -> PublishedTopology:
        """See Publishing.topology."""
        entry = await self._published()
        if entry is None:
            return PublishedTopology(text="", source="", revision=0)
        found = msgspec.json.decode(entry.value, type=TopologyEntry)
        return PublishedTopology(text=found.text, source=found.source, revision=entry.modified)

    async def orders(self, text: str, source: str) -> tuple[Order, ...]:
        """See Publishing.orders: the coordinator's own decision, on what the registry has now."""
        self._check(text, source)
        async with _answering():
            nodes = await self._registry.list(self._keys.nodes)
            orders = await self._registry.list(self._keys.desired)
        now, known = time.monotonic(), orders_of(entry.value for entry in orders.entries)
        books = Assignments(0, "", float("inf"), known, now)
        for entry in nodes.entries:
            books.is_there(entry.key.removeprefix(self._keys.nodes), room_of_node(entry.value))
        books.wants(wanted_of(msgspec.json.encode(TopologyEntry(text, source))))
        decision = books.decide(now)
        if decision.placement.problem:
            raise PdctlError(decision.placement.problem, decision.placement.hint or None)
        changed = {order.node: order for order in decision.orders}
        return tuple({**{order.node: order for order in known}, **changed}.values())

    async def publish(self, text: str, source: str, revision: int | None) -> int:
        """See Publishing.publish."""
        self._check(text, source)
        put = Put(self._keys.topology, msgspec.json.encode(TopologyEntry(text, source)))
        conditions = [] if revision is None else [Modified(self._keys.topology, revision)]
        async with _answering():
            written = await self._registry.write([put], conditions)
        if written is None:
            raise PdctlError(
                "another topology was published meanwhile", "look at the changes again: pdctl apply --dry-run"
            )
        return written

    async def withdraw(self) -> None:
        """See Publishing.withdraw."""
        async with _answering():
            await self._registry.write([Delete(self._keys.topology)])

    async def preview(self, order: Order) -> Changes:
        """See Publishing.preview."""
        running = self._running()
        plan: Plan = await self._planner.unprepared(order, running.plan)
        return running.changes(plan)

    async def _published(self) -> Entry | None:
        async with _answering():
            found = await self._registry.list(self._keys.topology)
        return next((entry for entry in found.entries if entry.key == self._keys.topology), None)

    def _check(self, text: str, source: str) -> None:
        """Raise ConfigError or PdctlError for a topology that no node of this cluster could run."""
        topology = load_cluster_text(text, source)
        if topology.cluster is None:
            raise PdctlError(f"{source} has no [cluster]", "this service runs in a cluster: add the table")
        if topology.service.name != self._service:
            raise PdctlError(f"{source} is for service {topology.service.name!r}, not for {self._service!r}")


@asynccontextmanager
async def _answering() -> AsyncIterator[None]:
    """Turns a registry that does not answer into an error for the user."""
    try:
        yield
    except Unavailable as failure:
        hint = "what runs goes on, and nothing can be changed until etcd answers; see: pdctl status"
        raise PdctlError(f"etcd does not answer: {failure}", hint) from failure
