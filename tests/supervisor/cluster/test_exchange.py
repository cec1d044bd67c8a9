"""Agents of several nodes and real limits of proxies: what is spent at one is spent at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdctl.net.http_client import Unreachable
from pdctl.proxy.shares.accounts import Accounts, LimitReached
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy_wire import KeySettings, SpentNews, SpentReply
from pdctl.supervisor.cluster import exchange
from pdctl.supervisor.cluster.exchange import SharedLimits
from pdctl.supervisor.cluster.spending import NodeSpent
from tests.news import News

pytestmark = pytest.mark.anyio
RULES = KeyRules((KeySettings("k", requests_per_minute=6, streams=20),))


class Node:
    """An agent and its proxy, which can be started again. `is_frozen`: the agent does not answer."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name, self.cluster = name, cluster
        self.proxy, self.starts = Accounts(RULES), 1
        self.asked = 0
        self.looks = 0
        self.is_frozen = False
        self.agent = SharedLimits(name, self.others, self.fetch, self.tell, self.wanted)

    def restart(self) -> None:
        self.proxy, self.starts = Accounts(RULES), self.starts + 1

    def wanted(self) -> bool:
        self.looks += 1
        self.cluster.tell()
        return self.cluster.wanted

    def others(self) -> list[str]:
        return [name for name in self.cluster.nodes if name != self.name]

    async def fetch(self, name: str) -> NodeSpent:
        node = self.cluster.nodes.get(name)
        self.asked += 1
        if node is None:
            raise Unreachable("gone")
        if node.is_frozen:
            await asyncio.Event().wait()
        return msgspec.json.decode(msgspec.json.encode(node.agent.report()), type=NodeSpent)

    async def tell(self, news: SpentNews) -> dict[str, SpentReply]:
        self.proxy.spent_elsewhere(msgspec.json.decode(msgspec.json.encode(news), type=SpentNews))
        reply = SpentReply(f"e{self.starts}", self.proxy.spent())
        self.cluster.tell()
        return {"proxy": reply}

    def left(self) -> int:
        remaining = self.proxy.remaining("k")
        assert remaining is not None
        return int(remaining[0] + 0.5)


class Cluster(News):
    def __init__(self, names: str) -> None:
        super().__init__()
        self.wanted = True
        self.nodes: dict[str, Node] = {}
        for name in names:
            self.nodes[name] = Node(name, self)


@asynccontextmanager
async def running(names: str = "abc") -> AsyncIterator[Cluster]:
    cluster = Cluster(names)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(node.agent.run_forever()) for node in cluster.nodes.values()]
        yield cluster
        for task in running:
            task.cancel()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_PERIOD_S", 0.01)
    monkeypatch.setattr("pdctl.proxy.shares.limits._MINUTE_S", 1e6)  # no refill during a test


async def heard(cluster: Cluster) -> None:
    """Until every proxy knows every other one."""
    nodes = cluster.nodes.values()
    await cluster.until(lambda: all(len(node.proxy._elsewhere._sources) >= len(nodes) - 1 for node in nodes))


async def test_a_limit_holds_over_all_nodes() -> None:
    async with running() as cluster:
        await heard(cluster)
        a, b, c = cluster.nodes.values()
        for node in (a, a, b, c):
            assert node.proxy.claim("k", 1, 1, 1) is not None
        await cluster.until(lambda: all(node.left() == 2 for node in (a, b, c)))
        assert a.proxy.claim("k", 1, 1, 2) is not None
        assert b.proxy.claim("k", 1, 1, 3) is not None
        await cluster.until(lambda: all(node.left() == 0 for node in (a, b, c)))
        with pytest.raises(LimitReached):
            c.proxy.claim("k", 1, 1, 1)


async def test_a_proxy_that_starts_again_is_charged_once_and_frees_nothing() -> None:
    async with running() as cluster:
        await heard(cluster)
        a, b, c = cluster.nodes.values()
        for node in (a, a, b, c):
            assert node.proxy.claim("k", 1, 1, 1) is not None
        await cluster.until(lambda: all(node.left() == 2 for node in (a, b, c)))
        a.restart()
        await cluster.until(lambda: a.left() == 2)
        assert a.proxy.claim("k", 1, 1, 1) is not None
        await cluster.until(lambda: all(node.left() == 1 for node in (a, b, c)))
        claim = b.proxy.claim("k", 1, 1, 1)
        await cluster.until(lambda: all(node.left() == 0 for node in (a, b, c)))
        assert claim is not None


async def test_a_node_that_vanishes_frees_only_its_answers() -> None:
    async with running() as cluster:
        await heard(cluster)
        a, b, c = cluster.nodes.values()
        assert b.proxy.claim("k", 1, 1, 15) is not None
        await cluster.until(lambda: all(node.left() == 5 for node in (a, b, c)))
        with pytest.raises(LimitReached, match="answers at once"):
            a.proxy.claim("k", 1, 1, 10)
        del cluster.nodes["b"]
        await cluster.until(lambda: a.proxy._limits["k"].elsewhere == 0)
        assert a.left() == 5
        assert a.proxy.claim("k", 1, 1, 10) is not None
        await cluster.until(lambda: c.left() == 4)


async def test_a_node_that_hangs_keeps_nobody_waiting_and_is_not_asked_twice() -> None:
    async with running() as cluster:
        await heard(cluster)
        a, b, c = cluster.nodes.values()
        c.is_frozen = True
        await cluster.until(lambda: {"c"} == a.agent._asking == b.agent._asking)
        before = a.asked
        assert a.proxy.claim("k", 1, 1, 1) is not None
        await cluster.until(lambda: b.left() == 5)
        await cluster.until(lambda: a.asked > before + 3)
        assert {"c"} == a.agent._asking - {"b"}


async def test_without_limits_nobody_is_asked() -> None:
    async with running("ab") as cluster:
        await heard(cluster)
        cluster.wanted = False
        a, b = cluster.nodes.values()
        # What was under way ends.
        await rounds(cluster, a, b)
        counts = [node.asked for node in (a, b)]
        await rounds(cluster, a, b)
        assert counts == [node.asked for node in (a, b)]


async def rounds(cluster: Cluster, *nodes: Node) -> None:
    """Until each has looked some more times whether there is anything to do."""
    due = {node.name: node.looks + 4 for node in nodes}
    await cluster.until(lambda: all(node.looks >= due[node.name] for node in nodes))
