"""1,250 agents with 10,000 engines over the registry in memory, in virtual time: start, lost nodes, a lost coordinator.

    python -m benchmarks.cluster.simulated [--engines 64 1024 10000] [--listeners 4] [--cells]

Each agent registers, stands for coordinator and follows its order with the code that ships; an engine is there as soon
as it is ordered. `--listeners`: so many agents also follow the engines of their cell and all nodes; what one of them
hears, each of all would hear. `--cells`: 32 nodes a cell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Never

import msgspec

from benchmarks.cluster.fleet import EACH, KEYS, cells, engine, node_entry, node_name, text
from pdctl.host.processor import cpu_name
from pdctl.registry import Change, Created, Delete, Listing, Modified, Put
from pdctl.registry.memory import MemoryRegistry
from pdctl.registry.mirror import follow
from pdctl.registry.store import Store
from pdctl.supervisor.cluster.coordinator import Coordinator
from pdctl.supervisor.cluster.entries import EngineEntry, Keys, Order, TopologyEntry
from pdctl.supervisor.cluster.membership import Membership
from pdctl.supervisor.cluster.neighbours import Neighbours
from pdctl.supervisor.cluster.presence import Presence
from pdctl.topology.spec import Cluster
from tests.virtual_loop import VirtualLoop

TTL_S, LOST_S = 10, 60.0
CLUSTER = Cluster(("http://e:2379",), "eth0", "/secret", ttl_s=TTL_S, node_lost_s=LOST_S)
# Of one call, seconds, and of all agents' starts.
_CALL_S, _STARTS_S = 0.002, 5.0


def now() -> float:
    return asyncio.get_running_loop().time()


class Line:
    """One agent's way to the registry: calls take 2 ms, and what goes over it is counted."""

    def __init__(self, registry: MemoryRegistry, counts: Counter[str]) -> None:
        self._registry, self._counts = registry, counts
        self.revoke, self.close = registry.revoke, registry.close

    async def _call(self, what: str, count: int = 1) -> None:
        await asyncio.sleep(_CALL_S * (0.5 + random.random()))
        self._counts[what] += count

    async def grant(self, ttl_s: int) -> int:
        await self._call("grants")
        return await self._registry.grant(ttl_s)

    async def keep(self, lease: int) -> None:
        await self._call("renewals")
        await self._registry.keep(lease)

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        await self._call("writes")
        return await self._registry.write(writes, conditions)

    async def list(self, prefix: str) -> Listing:
        await self._call("lists")
        return await self._registry.list(prefix)

    async def watch(self, prefix: str, after: int, tell: Callable[[tuple[Change, ...]], None]) -> Never:
        what = prefix.removeprefix(KEYS.all).partition("/")[0]

        def counted(changes: tuple[Change, ...]) -> None:
            self._counts[f"{what} events"] += len(changes)
            size = sum(len(change.key) + (len(change.entry.value) if change.entry else 0) for change in changes)
            self._counts[f"{what} bytes"] += size
            tell(changes)

        await self._registry.watch(prefix, after, counted)


class Fleet:
    """All agents of one run."""

    def __init__(self, nodes: int, listeners: int, racks: tuple[str, ...]) -> None:
        self.registry = MemoryRegistry(Store(history=50_000), now)
        self.counts: Counter[str] = Counter()
        self.orders: dict[str, Order] = {}
        self.known: list[Neighbours] = []
        self.said: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.nodes, self.listeners = nodes, listeners
        self.cluster = replace(CLUSTER, cells=racks)

    def start(self, group: asyncio.TaskGroup) -> None:
        self.tasks = {node_name(number): group.create_task(self._agent(number)) for number in range(self.nodes)}

    async def _agent(self, number: int) -> None:
        name, line = node_name(number), Line(self.registry, self.counts)
        cell = self.cluster.cell_of(name)
        keys = Keys("growth", cell)
        presence = Presence(line, keys, node_entry(number, cell), TTL_S, lambda: self._engines(number), _nothing)

        def ordered(changes: tuple[Change, ...]) -> None:
            for change in changes:
                if change.entry is not None and change.key == KEYS.order(name):
                    self.orders[name] = msgspec.json.decode(change.entry.value, type=Order)
                    presence.changed()

        coordinator = Coordinator(line, keys, name, self.cluster, self.said.append, _nothing, now)
        await asyncio.sleep(random.random() * _STARTS_S)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(presence.run_forever())
            tasks.create_task(coordinator.run_forever())
            tasks.create_task(follow(line, KEYS.order(name), ordered, _nothing))
            if number < self.listeners:
                membership = Membership(name, LOST_S)
                heard = Neighbours(line, keys, membership, _silence, _nothing, lambda: None, _nothing, now)
                self.known.append(heard)
                tasks.create_task(heard.run_forever())
                tasks.create_task(follow(line, keys.nodes, _nothing, _nothing))

    def _engines(self, number: int) -> list[EngineEntry]:
        order = self.orders.get(node_name(number))
        return [engine(number, place, name) for place, name in enumerate(order.engines)] if order else []

    def count(self) -> int:
        return sum(len(order.engines) for name, order in self.orders.items() if not self.tasks[name].done())

    def are_known(self, engines: int) -> bool:
        """Whether the listeners know the engines of all other nodes in their cell."""
        for number, each in enumerate(self.known):
            cell = self.cluster.cell_of(node_name(0))
            there = [len(order.engines) for name, order in self.orders.items()
                     if self.cluster.cell_of(name) == cell and name != node_name(number)]  # fmt: skip
            if len(each.used) < sum(there):
                return False
        return True

    async def until(self, holds: Callable[[], bool]) -> float:
        """Virtual seconds until it holds."""
        begun = now()
        while not holds():
            await asyncio.sleep(0.05)
            assert now() - begun < 600, self.said
        return now() - begun

    async def lose(self, names: list[str]) -> None:
        """Power off."""
        for name in names:
            self.tasks[name].cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.tasks[name]

    def holder(self) -> str:
        [entry] = [entry for entry in self.registry.store.listing(KEYS.coordinator).entries
                   if entry.key == KEYS.coordinator]  # fmt: skip
        return entry.value.decode()


def _nothing(_: object) -> None:
    pass


async def _silence(_: EngineEntry) -> None:
    return None


async def run(engines: int, listeners: int, in_cells: bool) -> None:
    # One node in fifty is spare room for those that are lost.
    needed = engines // EACH
    nodes = needed + max(2, needed // 50)
    racks = cells(nodes) if in_cells else ()
    fleet = Fleet(nodes, listeners, racks)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        fleet.start(group)
        await fleet.until(lambda: len(fleet.registry.store.listing(KEYS.nodes).entries) == fleet.nodes)
        await _phase(fleet, f"{fleet.nodes} nodes are registered", now(), began)
        entry = msgspec.json.encode(TopologyEntry(text(engines, racks=racks), "growth.toml"))
        await fleet.registry.write([Put(KEYS.topology, entry)])
        took = await fleet.until(lambda: fleet.count() == engines)
        took += await fleet.until(lambda: fleet.are_known(engines))
        await _phase(fleet, f"{engines} engines are placed and known", took, began)
        fleet.counts.clear()
        await asyncio.sleep(60)
        await _phase(fleet, "a quiet minute", 60, began)
        victims = [name for name in fleet.tasks if name not in (fleet.holder(), *map(node_name, range(listeners)))][:1]
        await fleet.lose(victims)
        took = await fleet.until(lambda: fleet.count() == engines)
        await _phase(fleet, "a node is lost: its engines run elsewhere", took, began)
        gone = fleet.holder()
        await fleet.lose([gone])
        took = await fleet.until(lambda: fleet.said[-1].startswith("this node coordinates"))
        await _phase(fleet, "the coordinator is lost: another one", took, began)
        for task in fleet.tasks.values():
            task.cancel()


async def _phase(fleet: Fleet, what: str, took: float, began: float) -> None:
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(fleet.counts.items()) if count)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {what}: {took:.1f} s; {counts} [real {time.perf_counter() - began:.0f} s, {rss:.0f} MiB]", flush=True)
    fleet.counts.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 1024, 10_000])
    parser.add_argument("--listeners", type=int, default=4)
    parser.add_argument("--cells", action="store_true")
    given = parser.parse_args()
    print(cpu_name())
    for engines in given.engines:
        print(f"{engines} engines:")
        random.seed(1)
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(run(engines, given.listeners, given.cells))


if __name__ == "__main__":
    main()
