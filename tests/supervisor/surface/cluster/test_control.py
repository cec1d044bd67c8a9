"""One node answers for its cluster, over real sockets: what it shows, where its verbs go, and who is missing."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from pdctl.control_api import RegistryStatus, RoleOrder, ServiceState, TopologyOrder
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool
from pdctl.supervisor.surface.cluster import agents
from pdctl.supervisor.surface.cluster.agents import AgentAddress
from pdctl.supervisor.surface.cluster.merge import ClusterFacts
from tests.supervisor.surface.cluster.nodes import SECRET, Part, cluster, exit_of, key, process

pytestmark = pytest.mark.anyio


@pytest.fixture
def a(tmp_path: Path) -> Part:
    return Part(tmp_path, "a", "127.0.0.2", process("prefill-0", "prefill"), process("proxy", "proxy"))


@pytest.fixture
def b(tmp_path: Path) -> Part:
    return Part(tmp_path, "b", "127.0.0.3", process("decode-0"), process("proxy", "proxy"))


async def test_processes_of_all_nodes_are_shown(a: Part, b: Part) -> None:
    async with cluster(b, a) as found:
        status = await found.control.fresh_status()
        plain = await found.control.status()
    shown = [("a", "prefill-0"), ("a", "a/proxy"), ("b", "decode-0"), ("b", "b/proxy")]
    assert [(one.node, one.name) for one in status.processes] == shown
    assert [(one.node, one.name) for one in plain.processes] == shown
    assert status.processes[0].running == 2
    assert status.state == plain.state == "ready"
    assert status.proxy_url == "http://127.0.0.3:8000", "that of the node which is asked"
    assert status.proxy_urls == ("http://127.0.0.2:8000", "http://127.0.0.3:8000")
    assert [(node.name, node.state, node.coordinator, node.asked, node.version) for node in status.nodes] == [
        ("a", "ready", True, False, "9.9"), ("b", "ready", False, True, "9.9"),
    ]  # fmt: skip
    assert status.registry == RegistryStatus(ok=True)


async def test_a_node_without_proxy_names_that_of_another(a: Part, b: Part) -> None:
    b.processes = b.processes[:1]
    async with cluster(b, a) as found:
        assert (await found.control.status()).proxy_url == "http://127.0.0.2:8000"


async def test_a_node_that_does_not_answer_is_shown_and_not_waited_for_again(a: Part, b: Part) -> None:
    with socket.create_server(("127.0.0.4", 0), backlog=8) as deaf:
        async with cluster(a, b) as found:
            found.known.append(AgentAddress("c", "127.0.0.4", deaf.getsockname()[1]))
            found.facts = ClusterFacts(RegistryStatus(ok=True), "a", {"decode-1": "c", "decode-2": "", "decode-0": "b"})
            loop = asyncio.get_running_loop()
            began = loop.time()
            status = await found.control.status()
            first_s = loop.time() - began
            for _ in range(10):
                assert (await found.control.status()).nodes == status.nodes
            assert first_s < 10
            assert loop.time() - began < 2 * first_s, "each of ten calls waited for it"
    assert status.state == "degraded"
    assert [(node.name, node.state) for node in status.nodes] == [("a", "ready"), ("b", "ready"), ("c", "silent")]
    assert "did not answer within 2 s" in status.nodes[2].reason
    assert status.nodes[2].engines == ("decode-1",)
    assert status.unplaced == ("decode-2",), "where decode-1 is, is known"
    assert len(status.processes) == 4


async def test_a_node_that_went_and_came_is_seen(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        await found.end("b")
        assert [node.state for node in (await found.control.status()).nodes] == ["ready", "silent"]
    async with cluster(a, b) as found:
        found.known = [unregistered(b.agent)]
        assert [node.state for node in (await found.control.status()).nodes] == ["ready", "unknown"]


def unregistered(agent: AgentAddress) -> AgentAddress:
    """The same, but the registry does not know it now."""
    return AgentAddress(agent.node, agent.host, agent.port, registered=False)


async def test_another_secret_is_refused(a: Part, b: Part) -> None:
    async with cluster(a, b, secret="another") as found:
        (_, other) = (await found.control.status()).nodes
        assert other.state == "silent"
        assert "secret" in other.reason
        assert await found.control.ask("b/decode-0", "stop", False) == f"node b does not answer: {other.reason}"
    assert b.asked == []


async def test_no_call_without_the_secret_does_anything(a: Part, b: Part) -> None:
    async with cluster(a, b):
        pool = ConnectionPool(b.agent.host, b.agent.port)
        calls = (("GET", "/v1/status"), ("POST", "/v1/processes/decode-0/stop"), ("GET", "/v1/events"))
        for given in ("", "authorization: Bearer \r\n", "authorization: Bearer x\r\n", f"authorization: {SECRET}\r\n"):
            header = given.encode()
            for method, path in calls:
                assert (await pool.request(method, path, header)).status == 403
        authorized = f"authorization: Bearer {SECRET}\r\n".encode()
        for method, path in (("POST", "/v1/apply"), ("POST", "/v1/stop"), ("POST", "/v1/cluster/topology")):
            assert (await pool.request(method, path, authorized)).status == 404, "no plan comes from another machine"
        pool.close()
    assert b.asked == []


async def test_verbs_go_where_the_process_is(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        control = found.control
        assert await control.ask("decode-0", "restart", True) == ""
        assert await control.ask("b/decode-0", "stop", False) == ""
        assert await control.ask("b/proxy", "restart", False) == ""
        assert await control.ask("a/proxy", "restart", False) == ""
        assert await control.ask("prefill-0", "drain", False) == ""
        assert await control.change_role("decode-0", RoleOrder(role="prefill")) == ""
        assert await control.change_role("decode-0", RoleOrder(role="hybrid")) == "decode-0 stays what it is"
    assert b.asked == ["restart decode-0, drained", "stop decode-0", "restart proxy", "decode-0 to prefill"]
    assert a.asked == ["restart proxy", "drain prefill-0"]


async def test_a_name_that_is_not_enough_is_refused_with_the_choices(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        control = found.control
        assert await control.ask("proxy", "restart", False) == (
            "several nodes have a process 'proxy': choose one of a/proxy, b/proxy"
        )
        assert await control.ask("decode-7", "restart", False) == (
            "no process 'decode-7'; known: prefill-0, a/proxy, decode-0, b/proxy"
        )
        assert await control.ask("c/decode-0", "restart", False) == (
            "no process 'c/decode-0'; known: prefill-0, a/proxy, decode-0, b/proxy"
        )
        await found.end("b")
        assert (await control.ask("decode-0", "restart", False)).endswith("known: prefill-0, a/proxy; no answer from b")
        assert await control.ask("proxy", "restart", False) == "", "there is no other that answers"
    assert (a.asked, b.asked) == (["restart proxy"], [])


async def test_exits_keys_and_leases_are_of_all_nodes(a: Part, b: Part) -> None:
    a.reports, b.reports = (exit_of("x", "2026-01-02"),), (exit_of("y", "2026-01-01"), exit_of("y", "2026-01-03"))
    a.lease_ids, b.lease_ids = ["1.a"], ["2.b", "3.b"]
    a.key_use, b.key_use = key(1, 1.0, 3), key(3, 2.0, 7)
    async with cluster(a, b) as found:
        control = found.control
        assert [(one.node, one.process) for one in await control.exits()] == [("b", "y"), ("a", "x"), ("b", "y")]
        (use,) = (await control.keys()).keys
        assert (use.requests, use.ttft_s, use.requests_left, use.running) == (4, 1.75, 3, 2)
        assert [one.id for one in (await control.leases()).leases] == ["1.a", "2.b", "3.b"]
        assert (await control.revoke("2.b")).ok
        assert b.lease_ids == ["3.b"]
        assert await control.revoke("9.c") == await a.revoke("9.c")
        await found.end("b")
        assert [*(await control.leases()).unreachable] == ["node b"]
        assert "node b" in (await control.revoke("3.b")).reason


async def test_states_of_nodes_together(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        together: dict[tuple[ServiceState, ServiceState], ServiceState] = {
            ("ready", "ready"): "ready", ("ready", "starting"): "starting", ("ready", "failed"): "failed",
            ("degraded", "starting"): "degraded", ("stopping", "failed"): "stopping",
        }  # fmt: skip
        for words, word in together.items():
            a.word, b.word = words
            assert (await found.control.status()).state == word
        a.word = b.word = "ready"
        a.processes = b.processes = ()
        assert (await found.control.status()).state == "empty"
        found.facts = ClusterFacts(RegistryStatus(ok=True), "a", {"decode-0": ""})
        assert (await found.control.status()).state == "starting"


async def test_a_topology_is_previewed_and_published(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        control = found.control
        tried = await control.publish(TopologyOrder(text="one two", source="f", dry_run=True))
        assert [(one.node, one.added) for one in tried.nodes] == [("a", ("one", "two")), ("b", ("one", "two"))]
        assert (await control.topology()).revision == 0
        assert (await control.publish(TopologyOrder(text="one", source="f", revision=0))).revision == 1
        assert (await control.topology()).text == "one"
        with pytest.raises(PdctlError, match="revision 1 is published, not 0"):
            await control.publish(TopologyOrder(text="two", source="f", revision=0))
        with pytest.raises(PdctlError, match="no node has room"):
            await control.publish(TopologyOrder(text="[", source="f"))
        assert await control.withdraw() == ""
        assert (await control.topology()).text == ""


async def test_a_node_that_cannot_say_what_would_change_is_named(a: Part, b: Part) -> None:
    async with cluster(a, b) as found:
        found.published.nodes = ("b",)
        reply = await found.control.publish(TopologyOrder(text="impossible", source="f", dry_run=True))
        assert [(one.node, one.unknown) for one in reply.nodes] == [("b", "node b: this node has no such engine")]


async def test_a_port_in_use_is_told(a: Part, b: Part) -> None:
    with socket.create_server((b.agent.host, b.agent.port)), pytest.raises(PdctlError, match="cannot listen at"):
        async with cluster(a, b) as found:
            await found.serving["b"]


async def test_many_that_are_silent_are_not_waited_for_one_after_the_other(
    a: Part, b: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "_AT_ONCE", 1)
    with socket.create_server(("127.0.0.4", 0), backlog=8) as deaf:
        async with cluster(a, b) as found:
            port = deaf.getsockname()[1]
            found.known[:0] = [AgentAddress(f"c{number}", "127.0.0.4", port) for number in range(20)]
            began = asyncio.get_running_loop().time()
            status = await found.control.status()
            assert asyncio.get_running_loop().time() - began < 20
    states = {node.name: node.state for node in status.nodes}
    assert states.pop("a") == "ready"
    assert {name for name, state in states.items() if state == "silent"} >= {f"c{number}" for number in range(20)}
    assert "too many do not answer" in {node.name: node.reason for node in status.nodes}["c19"]
