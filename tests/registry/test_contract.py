"""What every registry does: the same tests over the one in memory and over a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from pdctl.registry import Behind, Change, Created, Delete, LeaseGone, Modified, Put, Registry
from pdctl.registry.etcd.gateway import Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.registry.memory import MemoryRegistry
from pdctl.registry.store import Store
from tests.news import News
from tests.registry import etcd

pytestmark = pytest.mark.anyio
LONG_S = 60
Make = Callable[[], Registry]


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[etcd.Member | None]:
    if etcd.BINARY is None:
        yield None
        return
    with etcd.members(tmp_path_factory.mktemp("etcd"), 1) as [member]:
        yield member


@pytest.fixture(params=["memory", "etcd"])
def make(request: pytest.FixtureRequest, member: etcd.Member | None) -> Make:
    if request.param == "memory":
        return lambda: MemoryRegistry(Store(history=50))
    if member is None:
        pytest.skip("etcd is not installed")
    return lambda: EtcdRegistry(Gateway([member.url]))


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Each test has its own part of the one etcd."""
    return f"/{request.node.name}/"


@asynccontextmanager
async def opened(make: Make) -> AsyncIterator[Registry]:
    registry = make()
    try:
        async with asyncio.timeout(LONG_S):
            yield registry
    finally:
        await registry.close()


class Seen(News):
    """What a watch told, and a way to wait for it."""

    def __init__(self, registry: Registry, prefix: str, after: int) -> None:
        super().__init__()
        self.groups: list[tuple[Change, ...]] = []
        self.watch = registry.watch(prefix, after, self._take)

    def _take(self, changes: tuple[Change, ...]) -> None:
        self.groups.append(changes)
        self.tell()

    async def until_count(self, count: int) -> list[tuple[Change, ...]]:
        """At least `count` groups."""
        await self.until(lambda: len(self.groups) >= count)
        return self.groups


@asynccontextmanager
async def watching(registry: Registry, prefix: str, after: int) -> AsyncIterator[Seen]:
    seen = Seen(registry, prefix, after)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(seen.watch)
        yield seen
        task.cancel()


async def test_a_key_is_written_listed_and_deleted(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        first = await registry.write([Put(prefix + "a", b"\x00one"), Put(prefix + "b", b"")])
        second = await registry.write([Put(prefix + "a", b"two")])
        assert first is not None
        assert second == first + 1
        listing = await registry.list(prefix)
        assert [(e.key, e.value, e.created, e.modified, e.lease) for e in listing.entries] == [
            (prefix + "a", b"two", first, second, 0),
            (prefix + "b", b"", first, first, 0),
        ]
        assert listing.revision >= second
        await registry.write([Delete(prefix + "a"), Delete(prefix + "never")])
        assert [e.key for e in (await registry.list(prefix)).entries] == [prefix + "b"]


async def test_a_prefix_ends_where_its_last_letter_does(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        await registry.write([Put(prefix + "node", b""), Put(prefix + "nodf", b""), Put(prefix + "node/é", b"")])
        assert [e.key for e in (await registry.list(prefix + "node")).entries] == [prefix + "node", prefix + "node/é"]
        assert (await registry.list(prefix + "nothing")).entries == ()


async def test_conditions_hold_together_or_nothing_is_written(make: Make, prefix: str) -> None:
    key, other = prefix + "key", prefix + "other"
    async with opened(make) as registry:
        created = await registry.write([Put(key, b"1")], [Created(key, 0)])
        assert created is not None
        assert await registry.write([Put(key, b"2")], [Created(key, 0)]) is None
        assert await registry.write([Put(key, b"2")], [Modified(key, created), Created(other, 7)]) is None
        changed = await registry.write([Put(key, b"2"), Put(other, b"x")], [Modified(key, created), Modified(other, 0)])
        assert changed is not None
        assert await registry.write([Put(key, b"3")], [Modified(key, created)]) is None
        assert await registry.write([Put(key, b"3")], [Created(key, created)]) is not None
        assert {e.key: e.value for e in (await registry.list(prefix)).entries} == {key: b"3", other: b"x"}


async def test_only_one_of_many_becomes_the_owner(make: Make, prefix: str) -> None:
    key = prefix + "coordinator"
    async with opened(make) as registry:
        async with asyncio.TaskGroup() as tasks:
            tries = [
                tasks.create_task(registry.write([Put(key, str(n).encode())], [Created(key, 0)])) for n in range(8)
            ]
        won = [number for number, task in enumerate(tries) if task.result() is not None]
        assert len(won) == 1
        assert (await registry.list(key)).entries[0].value == str(won[0]).encode()


async def test_a_lease_that_is_revoked_takes_its_keys(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        lease = await registry.grant(LONG_S)
        await registry.write([Put(prefix + "a", b"", lease), Put(prefix + "b", b"", lease), Put(prefix + "c", b"")])
        await registry.keep(lease)
        start = (await registry.list(prefix)).revision
        async with watching(registry, prefix, start) as seen:
            await registry.revoke(lease)
            groups = await seen.until_count(1)
        assert [change.key for change in groups[0]] == [prefix + "a", prefix + "b"]
        assert all(change.entry is None and change.revision == groups[0][0].revision for change in groups[0])
        assert [e.key for e in (await registry.list(prefix)).entries] == [prefix + "c"]
        await registry.revoke(lease)
        with pytest.raises(LeaseGone):
            await registry.keep(lease)
        with pytest.raises(LeaseGone):
            await registry.write([Put(prefix + "d", b"", lease)])


async def test_a_lease_that_is_not_kept_ends_and_watchers_hear_of_it(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        lease, kept = await registry.grant(1), await registry.grant(LONG_S)
        revision = await registry.write([Put(prefix + "a", b"", lease), Put(prefix + "b", b"", kept)])
        assert revision is not None
        async with watching(registry, prefix, revision) as seen:
            groups = await seen.until_count(1)
        assert [(change.key, change.entry) for change in groups[0]] == [(prefix + "a", None)]
        assert [e.key for e in (await registry.list(prefix)).entries] == [prefix + "b"]


async def test_a_key_can_change_its_lease(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        old, new = await registry.grant(LONG_S), await registry.grant(LONG_S)
        await registry.write([Put(prefix + "a", b"1", old)])
        await registry.write([Put(prefix + "a", b"2", new)])
        await registry.revoke(old)
        assert [(e.value, e.lease) for e in (await registry.list(prefix)).entries] == [(b"2", new)]


async def test_a_watch_tells_everything_since_its_revision_in_order(make: Make, prefix: str) -> None:
    async with opened(make) as registry:
        start = (await registry.list(prefix)).revision
        await registry.write([Put(prefix + "a", b"1")])
        async with watching(registry, prefix, start) as seen:
            await seen.until_count(1)
            await registry.write([Put(prefix + "a", b"2"), Put(prefix + "b", b"2"), Put("/elsewhere", b"")])
            await registry.write([Delete(prefix + "a")])
            groups = await seen.until_count(3)
        told = [[(c.key.removeprefix(prefix), c.entry and c.entry.value) for c in group] for group in groups]
        assert told == [[("a", b"1")], [("a", b"2"), ("b", b"2")], [("a", None)]]
        assert [group[0].revision for group in groups] == sorted({group[0].revision for group in groups})


async def test_a_watch_from_a_forgotten_revision_says_so(make: Make, prefix: str, member: etcd.Member | None) -> None:
    async with opened(make) as registry:
        start = (await registry.list(prefix)).revision
        for number in range(60):
            await registry.write([Put(prefix + "a", str(number).encode())])
        if member is not None and isinstance(registry, EtcdRegistry):
            member.post("/v3/kv/compaction", {"revision": str((await registry.list(prefix)).revision)})
        with pytest.raises(Behind):
            await registry.watch(prefix, start, lambda changes: None)
