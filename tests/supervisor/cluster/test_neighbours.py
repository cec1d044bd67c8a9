"""A node hears of the others' engines, over the registry in memory: used, gone, unknown but answering, lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdctl.registry import Delete, Listing, Put, Refused
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.cluster import neighbours
from pdctl.supervisor.cluster.entries import GONE, EngineEntry, Keys
from pdctl.supervisor.cluster.membership import Membership
from pdctl.supervisor.cluster.neighbours import Neighbours
from tests.news import News

pytestmark = pytest.mark.anyio
KEYS = Keys("service")
DECODE = EngineEntry("b", "decode-0", "builtin", "decode", "10.0.0.2", 8000, "e1")
OTHER = EngineEntry("b", "decode-1", "builtin", "decode", "10.0.0.2", 8001, "e1")


class Rig(News):
    def __init__(self, keys: Keys = KEYS) -> None:
        super().__init__()
        self.registry = MemoryRegistry()
        self.answering = {"decode-0": "e1", "decode-1": "e1"}
        self.asked: list[str] = []
        self.frozen: set[str] = set()
        self.released: list[str] = []
        self.now = 0.0
        self.neighbours = Neighbours(
            self.registry, keys, Membership("a", 60), self.ask, self.release, self.tell, lambda failure: None,
            lambda: self.now,
        )  # fmt: skip

    async def ask(self, entry: EngineEntry) -> str | None:
        self.asked.append(entry.name)
        self.tell()
        if entry.name in self.frozen:
            await asyncio.Event().wait()
        return self.answering.get(entry.name)

    def release(self, holders: list[str]) -> None:
        self.released += holders
        self.tell()

    async def put(self, *entries: EngineEntry) -> None:
        await self.registry.write([Put(KEYS.engine(e.node, e.name), msgspec.json.encode(e)) for e in entries])

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.neighbours.used]


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.neighbours.run_forever())
        yield rig
        task.cancel()


async def test_engines_come_and_go_as_their_node_says() -> None:
    async with running() as rig:
        await rig.put(DECODE, OTHER)
        await rig.until(lambda: rig.names == ["decode-0", "decode-1"])
        await rig.put(msgspec.structs.replace(DECODE, state=GONE))
        await rig.until(lambda: rig.names == ["decode-1"])
        assert rig.released == ["decode-0@e1"]
        assert rig.asked == []


async def test_engines_of_a_silent_node_are_used_while_they_answer_and_forgotten_later() -> None:
    async with running() as rig:
        await rig.put(DECODE, OTHER)
        await rig.until(lambda: len(rig.names) == 2)
        del rig.answering["decode-1"]
        await rig.registry.write([Delete(KEYS.engine("b", name)) for name in ("decode-0", "decode-1")])
        await rig.until(lambda: rig.names == ["decode-0"])
        await rig.until(lambda: rig.asked.count("decode-0") > 1)
        assert rig.released == ["decode-1@e1"]
        rig.now = 61.0
        await rig.until(lambda: rig.names == [])
        assert rig.released == ["decode-1@e1", "decode-0@e1"]


async def test_an_engine_that_is_frozen_does_not_keep_the_others_from_being_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neighbours, "_ANSWER_S", 0.05)
    async with running() as rig:
        await rig.put(DECODE, OTHER)
        await rig.until(lambda: len(rig.names) == 2)
        rig.frozen.add("decode-1")
        await rig.registry.write([Delete(KEYS.engine("b", name)) for name in ("decode-0", "decode-1")])
        await rig.until(lambda: rig.names == ["decode-0"])
        await rig.until(lambda: rig.asked.count("decode-0") > 1)
        assert rig.released == ["decode-1@e1"]


async def test_engines_of_other_cells_are_not_heard_of() -> None:
    here, there = Keys("service", "rack1-*"), Keys("service", "rack2-*")
    rig = Rig(here)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.neighbours.run_forever())
        for keys, told in ((there, OTHER), (here, DECODE)):
            await rig.registry.write([Put(keys.engine("b", told.name), msgspec.json.encode(told))])
        await rig.until(lambda: bool(rig.names))
        assert rig.names == ["decode-0"]
        task.cancel()
    [entry] = (await rig.registry.list(there.engines_of("b"))).entries
    assert entry.key == "/pdctl/service/engines/rack2-*/b/decode-1"


async def test_what_vanished_while_the_registry_refused_is_not_used_as_if_it_were_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()

    async def refused(_: str) -> Listing:
        raise Refused("no permission")

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.neighbours.run_forever())
        await rig.put(DECODE)
        await rig.until(lambda: rig.names == ["decode-0"])
        task.cancel()
    with monkeypatch.context() as patched, pytest.raises(ExceptionGroup):
        patched.setattr(rig.registry, "list", refused)
        await rig.neighbours.run_forever()
    await rig.registry.write([Delete(KEYS.engine("b", "decode-0"))])
    rig.answering.clear()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.neighbours.run_forever())
        await rig.until(lambda: rig.names == [])
        task.cancel()
    assert rig.released == ["decode-0@e1"]
