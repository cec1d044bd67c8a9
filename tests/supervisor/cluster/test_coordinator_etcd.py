"""Coordinators over a real etcd: one at a time, and nothing moves when etcd itself has slept."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from pdctl.host.facts import encode_facts
from pdctl.registry import Change, Put
from pdctl.registry.etcd.gateway import Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.registry.mirror import follow
from pdctl.supervisor.cluster.coordinator import Coordinator
from pdctl.supervisor.cluster.entries import Keys, NodeEntry, Order, PlacementEntry, TopologyEntry
from pdctl.supervisor.cluster.presence import Presence
from pdctl.topology.spec import Cluster
from tests.news import News
from tests.registry import etcd
from tests.supervisor.cluster.test_coordinator import TEXT
from tests.topology.test_loader import GPUS, host

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]
LONG_S = 600
KEYS = Keys("service")
CLUSTER = Cluster(("http://e:2379",), "eth0", "/secret", ttl_s=3, node_lost_s=600.0)


class Rig(News):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.orders: list[Order] = []
        self.placements: list[PlacementEntry] = []
        self.said: list[str] = []
        self.known: set[str] = set()

    def seen(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            if change.entry is not None and change.key == KEYS.placement:
                self.placements.append(msgspec.json.decode(change.entry.value, type=PlacementEntry))
            if change.entry is not None and change.key.startswith(KEYS.desired):
                self.orders.append(msgspec.json.decode(change.entry.value, type=Order))
        self.tell()

    def say(self, node: str, sentence: str) -> None:
        self.said.append(f"{node}: {sentence}")
        self.tell()

    def state(self, node: str, failure: str | None) -> None:
        (self.known.add if failure is None else self.known.discard)(node)
        self.tell()

    async def agent(self, node: str) -> None:
        """A node with one GPU that registers and stands for coordinator."""
        registry = EtcdRegistry(Gateway([self.url]))
        facts = msgspec.Raw(encode_facts(host(GPUS[:1] * 4)))
        entry = NodeEntry(node, "10.0.0.1", node, "1", facts=facts)
        presence = Presence(registry, KEYS, entry, CLUSTER.ttl_s, list, lambda failure: self.state(node, failure))
        coordinator = Coordinator(
            registry, KEYS, node, CLUSTER, lambda text: self.say(node, text), lambda failure: None
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(presence.run_forever())
                tasks.create_task(coordinator.run_forever())
        finally:
            await coordinator.leave()
            await registry.close()


@asynccontextmanager
async def running(url: str) -> AsyncIterator[Rig]:
    rig = Rig(url)
    watcher = EtcdRegistry(Gateway([url]))
    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        agents = [tasks.create_task(rig.agent(node)) for node in ("a", "b")]
        await rig.until(lambda: rig.known == {"a", "b"})
        entry = TopologyEntry(TEXT, "pdctl.toml")
        await watcher.write([Put(KEYS.topology, msgspec.json.encode(entry))])
        watch = tasks.create_task(follow(watcher, KEYS.all, rig.seen, lambda failure: None))
        yield rig
        for task in (watch, *agents):
            task.cancel()
    await watcher.close()


async def test_an_etcd_that_slept_longer_than_all_leases_moves_no_engine(tmp_path: Path) -> None:
    with etcd.members(tmp_path, 1) as [member]:
        async with running(member.url) as rig:
            await rig.until(lambda: len(rig.orders) == 2 and bool(rig.placements))
            first = rig.said[0]
            member.signal(signal.SIGSTOP)
            await rig.until(lambda: any("does not coordinate the cluster any more" in text for text in rig.said))
            await rig.until(lambda: not rig.known)
            member.signal(signal.SIGCONT)
            await rig.until(lambda: "this node coordinates the cluster" in rig.said[-1] and rig.said[-1] != first)
            await rig.until(lambda: rig.placements[-1].term != rig.orders[0].term and not rig.placements[-1].away)
            assert len(rig.orders) == 2
            assert {order.node: len(order.engines) for order in rig.orders} == {"a": 2, "b": 2}
