"""Three real etcd members that are killed and frozen: news goes on, and silence is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pdctl.registry import Change, Put, Registry, Unavailable
from pdctl.registry.etcd.gateway import Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.registry.mirror import follow, pause_s
from tests.news import News
from tests.registry import etcd

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]
LONG_S = 120


class Followed(News):
    """What `follow` told: the present values, and whether they are known to be up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.states: list[str | None] = []

    def changed(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            if change.entry is None:
                del self.values[change.key]
            else:
                self.values[change.key] = change.entry.value
        self.tell()

    def state(self, failure: str | None) -> None:
        self.states.append(failure)
        self.tell()

    async def until_key(self, key: str) -> None:
        await self.until(lambda: key in self.values)

    async def until_state(self, known: bool) -> None:
        await self.until(lambda: bool(self.states) and (self.states[-1] is None) == known)


@asynccontextmanager
async def following(registry: Registry) -> AsyncIterator[Followed]:
    followed = Followed()
    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(follow(registry, "/n/", followed.changed, followed.state))
        yield followed
        task.cancel()


async def write(registry: Registry, key: str) -> None:
    """Until a member takes it. Each test writes a key once: a frozen member writes what it was asked to when it thaws,
    over newer values."""
    while True:
        try:
            await registry.write([Put(key, b"kept")])
            return
        except Unavailable:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_news_goes_on_when_any_one_member_is_lost(tmp_path: Path, number: int) -> None:
    with etcd.members(tmp_path, 3) as members:
        urls = [member.url for member in members]
        watcher, writer = EtcdRegistry(Gateway(urls)), EtcdRegistry(Gateway(urls))
        async with following(watcher) as followed:
            for turn, member in enumerate(members):
                await write(writer, f"/n/before-{turn}")
                await followed.until_key(f"/n/before-{turn}")
                member.signal(number)
                await write(writer, f"/n/without-{turn}")
                await followed.until_key(f"/n/without-{turn}")
                if number == signal.SIGKILL:
                    member.process.wait()
                    member.start()
                else:
                    member.signal(signal.SIGCONT)
        await watcher.close()
        await writer.close()


async def test_without_a_majority_entries_stay_and_their_age_is_told(tmp_path: Path) -> None:
    with etcd.members(tmp_path, 3) as members:
        registry = EtcdRegistry(Gateway([member.url for member in members]))
        async with following(registry) as followed:
            await write(registry, "/n/a")
            await followed.until_key("/n/a")
            for member in members[1:]:
                member.kill()
            await followed.until_state(known=False)
            with pytest.raises(Unavailable):
                await registry.list("/n/")
            assert followed.values == {"/n/a": b"kept"}
            for member in members[1:]:
                member.start()
            await followed.until_state(known=True)
            await write(registry, "/n/b")
            await followed.until_key("/n/b")
        await registry.close()


async def test_a_frozen_member_ends_the_watch_though_its_connection_stays(tmp_path: Path) -> None:
    with etcd.members(tmp_path, 1) as [member]:
        registry = EtcdRegistry(Gateway([member.url]))
        start = (await registry.list("/n/")).revision
        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_failure_of(registry, start))
            await registry.write([Put("/n/a", b"")])
            member.signal(signal.SIGSTOP)
            assert "does not answer" in await watch
        await registry.close()


async def _failure_of(registry: Registry, start: int) -> str:
    try:
        await registry.watch("/n/", start, lambda changes: None)
    except Unavailable as failure:
        return str(failure)


def test_pauses_grow_to_a_limit_and_are_spread() -> None:
    assert [pause_s(failures, 1.0) for failures in (0, 1, 2, 50)] == [0.2, 0.4, 0.8, 5.0]
    assert pause_s(50, 0.0) == 2.5


def test_nothing_is_left(tmp_path: Path) -> None:
    with etcd.members(tmp_path, 1) as [member]:
        pid = member.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
