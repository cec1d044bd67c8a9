"""Drains in a cluster: an engine is not stopped while a proxy of another node has a request there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.supervisor.agent.drains import calls_elsewhere, calls_route
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.proxies import Proxies
from tests.supervisor.surface.cluster.nodes import Part, cluster, start_agent

pytestmark = pytest.mark.anyio


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Part, ...]:
    return tuple(Part(tmp_path, node, f"127.0.0.{number}") for number, node in enumerate("abc", 2))


class Asked:
    """How many calls a node's own proxies have, and for which engines that was asked."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.engines: list[str] = []

    async def __call__(self, engine: str) -> int:
        self.engines.append(engine)
        return self.calls


async def test_calls_of_all_other_nodes_count(parts: tuple[Part, ...]) -> None:
    asked = {"b": Asked(2), "c": Asked(3)}
    async with cluster(*parts) as found:
        for node, calls_at in asked.items():
            found.more[node] = [calls_route(calls_at)]
            await found.end(node)
            await start_agent(found, found.parts[node])
        assert await calls_elsewhere(found.control.agents, "decode 0&x") == 5
    assert [asked[node].engines for node in "bc"] == [["decode 0&x"]] * 2


async def test_a_registered_node_that_does_not_answer_may_have_a_call(parts: tuple[Part, ...]) -> None:
    async with cluster(*parts) as found:
        for node in "bc":
            found.more[node] = [calls_route(Asked(0))]
            await found.end(node)
        await start_agent(found, found.parts["c"])
        assert await calls_elsewhere(found.control.agents, "decode-0") == 1
        found.known = [replace(agent, registered=agent.node != "b") for agent in found.known]
        assert await calls_elsewhere(found.control.agents, "decode-0") == 0
        await start_agent(found, found.parts["b"])


async def test_a_drain_waits_for_the_proxies_of_other_nodes(tmp_path: Path) -> None:
    elsewhere = Asked(4)
    proxies = Proxies(RunDir(tmp_path), "secret", list)
    assert await proxies.calls_at("decode-0") == 0
    proxies.calls_elsewhere = elsewhere
    assert await proxies.calls_at("decode-0") == 4
    assert await proxies.own_calls_at("decode-0") == 0, "nodes that ask each other in turn would never end"
    assert elsewhere.engines == ["decode-0"]
