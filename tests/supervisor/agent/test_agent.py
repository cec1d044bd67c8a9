"""A node's part of a cluster, over the registry in memory: what a refusal stops, and that it ends when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Never, cast

import pytest

from pdctl.plan import Share, make_plan
from pdctl.proxy_wire import SpentNews, SpentReply
from pdctl.registry import Change, Refused
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.agent import agent as module
from pdctl.supervisor.agent.agent import Agent, AgentSettings
from pdctl.supervisor.agent.plans import this_node
from pdctl.supervisor.cluster.entries import EngineEntry, Keys
from pdctl.supervisor.service.running import RunningService
from pdctl.topology.loader import load_cluster_text
from pdctl.topology.spec import ApiKey
from tests.news import News
from tests.service import free_port
from tests.supervisor.agent.test_publishing import SOURCE, TEXT
from tests.supervisor.surface.cluster.nodes import Part

pytestmark = pytest.mark.anyio
KEYS = Keys("service")


class Proxies(News):
    """Of this node, counting what they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[SpentNews] = []

    async def spent(self, news: SpentNews) -> dict[str, SpentReply]:
        self.told.append(news)
        self.tell()
        return {}

    async def quarantined(self, told: dict[str, float] | None) -> dict[str, float]:
        return {}

    async def own_calls_at(self, engine: str) -> int:
        return 0


class Running(Part):
    """A service that runs nothing, with an API key that has a limit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "a", "127.0.0.2")
        self.proxies = Proxies()
        limited = (ApiKey("team", requests_per_minute=9),)
        self.plan = replace(self.plan, proxy=replace(self.plan.proxy, keys=limited))

    def engines(self) -> list[EngineEntry]:
        return []


class Refusing(MemoryRegistry):
    """Refuses to show what begins with `prefix`."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.refused = News()
        self.refusals = 0

    async def watch(self, prefix: str, after: int, tell: Callable[[tuple[Change, ...]], None]) -> Never:
        if prefix == self.prefix:
            self.refusals += 1
            self.refused.tell()
            raise Refused("permission denied")
        await super().watch(prefix, after, tell)


def agent(registry: MemoryRegistry, folder: Path, said: Callable[[str, str], None] = lambda name, line: None) -> Agent:
    topology = load_cluster_text(TEXT, SOURCE)
    assert topology.cluster is not None
    cluster = replace(topology.cluster, agent_port=free_port())
    empty = make_plan(topology, this_node("127.0.0.2"), None, Share("a", is_empty=True))
    return Agent(AgentSettings(cluster, "a", "127.0.0.2", "secret", empty, folder), registry, said)


async def test_limits_are_shared_while_the_registry_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What API keys used goes from agent to agent: a permission that is missing in etcd must not stop that."""
    monkeypatch.setattr(module, "_REFUSED_S", 3600.0)
    registry, running = Refusing(KEYS.quarantine), Running(tmp_path)
    found = agent(registry, tmp_path)
    service = cast("RunningService", running)
    found.control(service)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(found.run_forever(service))
        await registry.refused.until(lambda: registry.refusals == 1)
        told = len(running.proxies.told)
        await running.proxies.until(lambda: len(running.proxies.told) >= told + 2)
        task.cancel()
    await found.leave()


async def test_a_part_that_misses_its_cancellation_ends_when_the_node_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's task groups lose one that comes while a task of theirs fails."""
    monkeypatch.setattr(module, "_REFUSED_S", 0.0)
    registry, running = Refusing(KEYS.quarantine), Running(tmp_path)
    found = agent(registry, tmp_path)
    service = cast("RunningService", running)
    found.control(service)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        left = tasks.create_task(found._always("quarantine", lambda: _refused(registry)))
        await registry.refused.until(lambda: registry.refusals > 2)
        await found.leave()
        await left


async def _refused(registry: Refusing) -> Never:
    await registry.watch(registry.prefix, 0, lambda changes: None)
