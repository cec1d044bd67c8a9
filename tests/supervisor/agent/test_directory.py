"""The nodes that are listed: registered ones, and for a while those that were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdctl.registry import Delete, Put
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.agent.directory import Directory
from pdctl.supervisor.cluster.entries import Keys, NodeEntry
from tests.news import News

pytestmark = pytest.mark.anyio
KEYS = Keys("service")


class Rig(News):
    def __init__(self) -> None:
        super().__init__()
        self.registry = MemoryRegistry()
        self.now = 0.0
        self.directory = Directory(self.registry, KEYS, "a", 60.0, lambda failure: None, lambda: self.now)

    async def put(self, *names: str) -> None:
        entries = [NodeEntry(name, f"10.0.0.{ord(name[0])}", "boot", "1.0", 18090) for name in names]
        await self.registry.write([Put(KEYS.node(entry.name), msgspec.json.encode(entry)) for entry in entries])

    def seen(self) -> list[tuple[str, bool]]:
        return [(agent.node, agent.registered) for agent in self.directory.others()]

    async def sees(self, *wanted: tuple[str, bool]) -> None:
        """The registry in memory tells as soon as the loop turns."""
        async with asyncio.timeout(60):
            while self.seen() != [*wanted]:
                await asyncio.sleep(0)


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.directory.run_forever())
        yield rig
        task.cancel()


async def test_other_nodes_are_listed_with_their_addresses() -> None:
    async with running() as rig:
        await rig.put("c", "a", "b")
        await rig.sees(("b", True), ("c", True))
        assert [agent.text for agent in rig.directory.others()] == ["10.0.0.98:18090", "10.0.0.99:18090"]


async def test_a_node_that_is_gone_is_listed_for_a_while_and_again_when_it_is_back() -> None:
    async with running() as rig:
        await rig.put("b", "c")
        await rig.sees(("b", True), ("c", True))
        await rig.registry.write([Delete(KEYS.node("b"))])
        await rig.sees(("b", False), ("c", True))
        rig.now = 59.0
        assert rig.seen() == [("b", False), ("c", True)]
        await rig.put("b")
        await rig.sees(("b", True), ("c", True))
        await rig.registry.write([Delete(KEYS.node("b"))])
        await rig.sees(("b", False), ("c", True))
        rig.now = 120.0
        assert rig.seen() == [("c", True)]


async def test_what_is_not_understood_is_left_out() -> None:
    async with running() as rig:
        await rig.registry.write([Put(KEYS.node("x"), b"\xff{")])
        await rig.put("b")
        await rig.sees(("b", True))
