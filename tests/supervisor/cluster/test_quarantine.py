"""A body that killed engines at one proxy is refused by the proxies of all nodes, through the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest

from pdctl.net.openai.api import ApiError
from pdctl.proxy.request.quarantine import Quarantine
from pdctl.registry import Created, Delete, Listing, Modified, Put, Registry, Unavailable
from pdctl.registry.etcd.gateway import Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.registry.memory import MemoryRegistry
from pdctl.registry.store import Store
from pdctl.supervisor.cluster import quarantine
from pdctl.supervisor.cluster.entries import Keys
from pdctl.supervisor.cluster.quarantine import SharedQuarantine
from tests.news import News
from tests.registry import etcd

pytestmark = pytest.mark.anyio
KEYS = Keys("service")
BODY = b'{"prompt":"kills"}'
Make = Callable[[], Registry]


class Breaking(MemoryRegistry):
    """A registry in memory that can be down. `writes`: calls that wrote something."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.is_down = False
        self.writes = 0

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        self.writes += 1
        if self.is_down:
            raise Unavailable("down")
        return await super().write(writes, conditions)

    async def list(self, prefix: str) -> Listing:
        if self.is_down:
            raise Unavailable("down")
        return await super().list(prefix)


class Node:
    def __init__(self, name: str, registry: Registry, news: News) -> None:
        self.news = news
        self.proxy = Quarantine("secret")
        self.exchanges = 0
        self.agent = SharedQuarantine(registry, KEYS, name, self.exchange)

    async def exchange(self, told: dict[str, float] | None) -> dict[str, float]:
        if told is not None:
            self.proxy.told(told)
        self.exchanges += 1
        self.news.tell()
        return self.proxy.found()

    def refuses(self, body: bytes = BODY) -> bool:
        try:
            self.proxy.check(body)
        except ApiError:
            return True
        return False


class Cluster(News):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        self.registries = [make() for _ in range(3)]
        self.nodes = [Node(name, registry, self) for name, registry in zip("abc", self.registries, strict=True)]


@asynccontextmanager
async def running(make: Make) -> AsyncIterator[Cluster]:
    cluster = Cluster(make)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(node.agent.run_forever()) for node in cluster.nodes]
            yield cluster
            for task in running:
                task.cancel()
    finally:
        for registry in cluster.registries:
            await registry.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_PERIOD_S", 0.01)


@pytest.fixture
def memory() -> Breaking:
    return Breaking(Store())


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[etcd.Member]:
    if etcd.BINARY is None:
        pytest.skip("etcd is not installed")
    with etcd.members(tmp_path_factory.mktemp("etcd"), 1) as [member]:
        yield member


async def test_all_nodes_refuse_what_one_found(memory: Breaking) -> None:
    async with running(lambda: memory) as cluster:
        a, b, c = cluster.nodes
        assert not b.refuses()
        a.proxy.put(BODY)
        await cluster.until(lambda: b.refuses() and c.refuses())
        assert not b.refuses(BODY + b" ")
        (entry,) = (await memory.list(KEYS.quarantine)).entries
        assert entry.lease
        # The same body at another node, and many exchanges: nothing is written again.
        b.proxy.put(BODY)
        before = c.exchanges
        await cluster.until(lambda: c.exchanges > before + 5)
        assert memory.writes == 1


async def test_the_same_over_etcd(member: etcd.Member) -> None:
    async with running(lambda: EtcdRegistry(Gateway([member.url]))) as cluster:
        a, b, c = cluster.nodes
        a.proxy.put(BODY)
        c.proxy.put(b"another")
        await cluster.until(lambda: all(node.refuses() and node.refuses(b"another") for node in (a, b, c)))
        assert len((await cluster.registries[0].list(KEYS.quarantine)).entries) == 2


async def test_a_body_is_free_again_when_its_time_is_over(memory: Breaking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.proxy.request.quarantine._REMEMBERED_S", 2.0)
    async with running(lambda: memory) as cluster:
        a, b, _ = cluster.nodes
        a.proxy.put(BODY)
        await cluster.until(b.refuses)
        await cluster.until(lambda: not a.refuses() and not b.refuses())
        await cluster.until(lambda: not b.agent._known)
        assert memory.writes == 1, "the end of its lease is no reason to tell it again"


async def test_a_registry_that_is_down_delays_it_and_a_lost_key_is_told_again(memory: Breaking) -> None:
    async with running(lambda: memory) as cluster:
        a, b, _ = cluster.nodes
        await cluster.until(lambda: all(node.agent._is_listed for node in cluster.nodes))
        memory.is_down = True
        a.proxy.put(BODY)
        await cluster.until(lambda: memory.writes > 1)
        assert not b.refuses()
        memory.is_down = False
        await cluster.until(b.refuses)
        (entry,) = (await memory.list(KEYS.quarantine)).entries
        await memory.revoke(entry.lease)
        writes = memory.writes
        await cluster.until(lambda: memory.writes > writes)
        await cluster.until(b.refuses)


async def test_before_the_first_list_the_proxies_keep_what_an_earlier_agent_told(memory: Breaking) -> None:
    memory.is_down = True
    async with running(lambda: memory) as cluster:
        a, *_ = cluster.nodes
        other = Quarantine("secret")
        other.put(BODY)
        a.proxy.told(other.found())
        before = a.exchanges
        await cluster.until(lambda: a.exchanges > before + 3)
        assert a.refuses()
        memory.is_down = False
        await cluster.until(lambda: not a.refuses())


async def test_a_proxy_that_starts_again_is_told_what_its_earlier_start_found(memory: Breaking) -> None:
    async with running(lambda: memory) as cluster:
        a, b, _ = cluster.nodes
        a.proxy.put(BODY)
        await cluster.until(b.refuses)
        a.proxy = Quarantine("secret")
        await cluster.until(a.refuses)


async def test_strange_entries_and_a_full_registry_are_harmless(
    memory: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_MOST", 2)
    prefix = KEYS.quarantine
    await memory.write([Put(f"{prefix}x", b'{"node":"z","left_s":9}'), Put(f"{prefix}{'00' * 16}", b"\xff")])
    async with running(lambda: memory) as cluster:
        a, b, _ = cluster.nodes
        await cluster.until(lambda: a.agent._is_listed)
        assert a.agent._known == {}
        for number in range(4):
            a.proxy.put(b"%d" % number)
        await cluster.until(lambda: len(b.agent._known) == 2)
        before = a.exchanges
        await cluster.until(lambda: a.exchanges > before + 5)
        assert len((await memory.list(prefix)).entries) == 4
