"""The topology that a cluster runs: read, changed and withdrawn in the registry, for the commands of any node."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from pdctl.control_api import PublishedTopology
from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.registry import Entry, Modified, Put, Registry, Unavailable
from pdctl.registry.mirror import pause_s
from pdctl.supervisor.agent.plans import Planner
from pdctl.supervisor.cluster.assignments import Assignments, orders_of
from pdctl.supervisor.cluster.coordinator import room_of_node, wanted_of
from pdctl.supervisor.cluster.entries import WITHDRAWN, Keys, Order, TopologyEntry
from pdctl.supervisor.service.running import RunningService
from pdctl.topology.loader import load_cluster_text

Found = TypeVar("Found")

# A member that is lost, or a new leader, is no reason to fail: so long a command waits for an answer, seconds.
_PATIENCE_S = 5.0
_OVERWRITES = 5


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
        try:
            found = msgspec.json.decode(entry.value, type=TopologyEntry)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            hint = "use the same version of pdctl on all nodes, or publish a topology anew: pdctl down, then pdctl up"
            raise PdctlError(f"the topology in the registry is not understood: {failure}", hint) from failure
        return PublishedTopology(text=found.text, source=found.source, revision=entry.modified)

    async def orders(self, text: str, source: str) -> tuple[Order, ...]:
        """See Publishing.orders: the coordinator's own decision, on what the registry has now."""
        self._check(text, source)
        nodes = await _answer(lambda: self._registry.list(self._keys.nodes))
        orders = await _answer(lambda: self._registry.list(self._keys.desired))
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
        entry = TopologyEntry(text, source)
        if revision is None:
            return await self._overwrite(entry)
        written = await self._write(entry, revision)
        if written is None:
            raise PdctlError(
                "another topology was published meanwhile", "look at the changes again: pdctl apply --dry-run"
            )
        return written

    async def withdraw(self) -> None:
        """See Publishing.withdraw."""
        await self._overwrite(WITHDRAWN)

    async def _overwrite(self, entry: TopologyEntry) -> int:
        """Write it, whatever is there."""
        for _attempt in range(_OVERWRITES):
            found = await self._published()
            written = await self._write(entry, found.modified if found is not None else 0)
            if written is not None:
                return written
        raise PdctlError("other topologies are published all the time", "look who else runs pdctl up, apply or down")

    async def _write(self, entry: TopologyEntry, revision: int) -> int | None:
        """Write it over what was written in `revision`, so that a try whose answer was lost cannot happen later.
        Returns the new revision; None if there is another topology by now."""
        put = Put(self._keys.topology, msgspec.json.encode(entry))
        written = await _answer(lambda: self._registry.write([put], [Modified(put.key, revision)]))
        if written is None and (found := await self._published()) is not None and found.value == put.value:
            # It was written by a try whose answer was lost.
            return found.modified
        return written

    async def preview(self, order: Order) -> Changes:
        """See Publishing.preview."""
        running = self._running()
        plan: Plan = await self._planner.unprepared(order, running.plan)
        return running.changes(plan)

    async def _published(self) -> Entry | None:
        found = await _answer(lambda: self._registry.list(self._keys.topology))
        return next((entry for entry in found.entries if entry.key == self._keys.topology), None)

    def _check(self, text: str, source: str) -> None:
        """Raise ConfigError or PdctlError for a topology that no node of this cluster could run."""
        topology = load_cluster_text(text, source)
        if topology.cluster is None:
            raise PdctlError(f"{source} has no [cluster]", "this service runs in a cluster: add the table")
        if topology.service.name != self._service:
            raise PdctlError(f"{source} is for service {topology.service.name!r}, not for {self._service!r}")


async def _answer(call: Callable[[], Awaitable[Found]]) -> Found:
    """What an idempotent call gives, made again until the registry answers. Raises PdctlError if it does not."""
    deadline, failures = time.monotonic() + _PATIENCE_S, 0
    while True:
        try:
            return await call()
        except Unavailable as failure:
            if time.monotonic() > deadline:
                hint = "what runs goes on, and nothing can be changed until etcd answers; see: pdctl status"
                raise PdctlError(f"etcd does not answer: {failure}", hint) from failure
        await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret
        failures += 1
