"""Topologies in the registry: what each node would run, published once, refused where they cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pdctl.errors import ConfigError, PdctlError
from pdctl.host import read_host
from pdctl.host.facts import encode_facts
from pdctl.plan import Plan, Share, make_plan
from pdctl.plan.changes import Changes, diff
from pdctl.registry import Created, Delete, Listing, Modified, Put, Unavailable
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.agent import publishing
from pdctl.supervisor.agent.plans import Planner, commands_in, engines_of, this_node
from pdctl.supervisor.agent.publishing import Publisher
from pdctl.supervisor.cluster.entries import Keys, NodeEntry, Order, TopologyEntry
from pdctl.topology.loader import load_cluster_text
from tests.registry.late import LateRegistry

pytestmark = pytest.mark.anyio
KEYS = Keys("service")
TEXT = """
[service]
name = "service"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://127.0.0.1:1"]
interface = "127.0.0.1"
secret_file = "secret"
[[engines]]
name = "prefill"
role = "prefill"
replicas = 2
[[engines]]
name = "decode"
role = "decode"
"""
SOURCE = "/x/pdctl.toml"


class Service:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def changes(self, wanted: Plan) -> Changes:
        return diff(self.plan, wanted)


def empty() -> Plan:
    topology = load_cluster_text(TEXT, SOURCE)
    return make_plan(topology, this_node("127.0.0.2"), None, Share("a", is_empty=True))


def planner(allow_commands: bool = False) -> Planner:
    cluster = load_cluster_text(TEXT, SOURCE).cluster
    assert cluster is not None
    return Planner("a", "127.0.0.2", cluster, empty(), allow_commands, lambda name, message: None)


async def published(registry: MemoryRegistry, *nodes: str) -> Publisher:
    for node in nodes:
        facts = msgspec.Raw(encode_facts(replace(read_host(), address="127.0.0.2")))
        entry = NodeEntry(node, "127.0.0.2", "boot", "1.0", 18090, facts)
        await registry.write([Put(KEYS.node(node), msgspec.json.encode(entry))])
    service = Service(empty())
    return Publisher(registry, KEYS, "service", planner(), lambda: service)  # type: ignore[arg-type, return-value]


def engines(orders: tuple[Order, ...]) -> dict[str, list[str]]:
    return {order.node: sorted(order.engines) for order in orders}


async def test_every_node_gets_an_order_and_every_engine_one_place() -> None:
    publisher = await published(MemoryRegistry(), "a", "b")
    found = engines(await publisher.orders(TEXT, SOURCE))
    assert sorted(found) == ["a", "b"]
    assert sorted(name for names in found.values() for name in names) == ["decode-0", "prefill-0", "prefill-1"]


async def test_a_topology_is_published_only_over_the_one_that_was_looked_at() -> None:
    publisher = await published(MemoryRegistry(), "a")
    assert (await publisher.topology()).revision == 0
    first = await publisher.publish(TEXT, SOURCE, 0)
    assert (await publisher.topology()).text == TEXT
    second = await publisher.publish(TEXT + "# again", SOURCE, first)
    with pytest.raises(PdctlError, match="another topology was published meanwhile"):
        await publisher.publish(TEXT, SOURCE, first)
    assert await publisher.publish(TEXT, SOURCE, None) > second
    await publisher.withdraw()
    withdrawn = await publisher.topology()
    assert (withdrawn.text, withdrawn.source) == ("", "")
    assert await publisher.publish(TEXT, SOURCE, withdrawn.revision) > withdrawn.revision


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "service"', 'name = "other"'), "is for service 'other', not for 'service'"),
        (("[cluster]", "[clutter]"), "1 problem"),
        (("replicas = 2", "replicas = 0"), "1 problem"),
    ],
)
async def test_what_no_node_could_run_is_not_published(change: tuple[str, str], message: str) -> None:
    publisher = await published(MemoryRegistry(), "a")
    with pytest.raises((ConfigError, PdctlError), match=message):
        await publisher.publish(TEXT.replace(*change), SOURCE, None)
    assert (await publisher.topology()).text == ""


async def test_engines_without_a_node_are_told() -> None:
    publisher = await published(MemoryRegistry())
    with pytest.raises(PdctlError, match="no such node is there"):
        await publisher.orders(TEXT, SOURCE)


class Forgetful(MemoryRegistry):
    """Every other call is not answered; what it asks for is done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    async def list(self, prefix: str) -> Listing:
        found = await super().list(prefix)
        self._forget()
        return found

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        written = await super().write(writes, conditions)
        self._forget()
        return written

    def _forget(self) -> None:
        self.calls += 1
        if self.calls % 2:
            raise Unavailable("no answer")


async def test_calls_that_are_not_answered_are_made_again_and_publish_once() -> None:
    registry = Forgetful()
    publisher = await published(registry)
    revision = await publisher.publish(TEXT, SOURCE, 0)
    assert (await publisher.topology()).revision == revision == registry.store.revision
    with pytest.raises(PdctlError, match="another topology was published meanwhile"):
        await publisher.publish(TEXT + "# another", SOURCE, 0)
    await publisher.withdraw()
    assert (await publisher.topology()).text == ""


@pytest.mark.parametrize("first", ["publish", "withdraw"])
async def test_a_member_that_thaws_brings_back_no_topology(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_PATIENCE_S", 0.0)
    registry = LateRegistry()
    publisher = await published(registry)
    begun = await publisher.publish(TEXT, SOURCE, 0) if first == "withdraw" else 0
    registry.is_frozen = True
    with pytest.raises(PdctlError, match="the member is frozen"):
        await (publisher.withdraw() if first == "withdraw" else publisher.publish(TEXT, SOURCE, begun))
    registry.is_frozen = False
    if first == "withdraw":
        await publisher.publish(TEXT + "# again", SOURCE, begun)
    else:
        await publisher.withdraw()
    expected = await publisher.topology()
    await registry.thaw()
    assert await publisher.topology() == expected


async def test_a_registry_that_does_not_answer_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_PATIENCE_S", 0.0)

    class Silent(MemoryRegistry):
        async def list(self, prefix: str) -> object:  # type: ignore[override]
            raise Unavailable("10.0.0.1:2379 did not answer")

    publisher = await published(Silent())
    with pytest.raises(PdctlError, match=r"etcd does not answer: 10\.0\.0\.1:2379") as found:
        await publisher.topology()
    assert found.value.hint is not None
    assert found.value.hint.startswith("what runs goes on")


@pytest.mark.parametrize("value", [b"{", b'{"text":1}', b'{"text":"\xff"}'])
async def test_a_topology_that_is_none_is_an_error_with_a_hint(value: bytes) -> None:
    registry = MemoryRegistry()
    publisher = await published(registry, "a")
    await registry.write([Put(KEYS.topology, value)])
    with pytest.raises(PdctlError, match="the topology in the registry is not understood") as found:
        await publisher.topology()
    assert found.value.hint is not None
    assert "the same version of pdctl" in found.value.hint


async def test_a_preview_says_what_an_order_changes_here() -> None:
    publisher = await published(MemoryRegistry(), "a")
    order = Order(1, "a", TopologyEntry(TEXT, SOURCE), ("prefill-1", "decode-0"))
    assert (await publisher.preview(order)).added == ("prefill-1", "decode-0", "proxy")


async def test_the_plan_of_an_order_is_this_nodes_share_at_its_address() -> None:
    order = Order(1, "a", TopologyEntry(TEXT, SOURCE), ("prefill-1",))
    plan = await planner().unprepared(order, empty())
    assert [(spec.name, spec.host) for spec in plan.processes] == [("prefill-1", "127.0.0.2"), ("proxy", "127.0.0.2")]
    assert plan.proxy_url == "http://127.0.0.2:8000"
    nothing = await planner().unprepared(Order(1, "a", None, ()), plan)
    assert nothing.processes == ()


COMMANDS = {
    "[[processes]]": '[[processes]]\nname = "x"\ncommand = ["/bin/true"]\n',
    "args of group far": '[[engines]]\nname = "far"\nrole = "decode"\nkind = "vllm"\nargs = ["--trust-remote-code"]\n',
    "env of group far": '[[engines]]\nname = "far"\nrole = "decode"\nenv = { LD_PRELOAD = "/x.so" }\n',
    "python of group far": f'[[engines]]\nname = "far"\nrole = "decode"\npython = "{Path("/bin/sh")}"\n',
}


@pytest.mark.parametrize("key", COMMANDS)
async def test_whoever_may_write_to_the_registry_may_not_run_commands(key: str) -> None:
    from pdctl.topology.loader import parse_text

    assert commands_in(parse_text(TEXT + COMMANDS[key], SOURCE)) == key
    order = Order(1, "a", TopologyEntry(TEXT + COMMANDS[key], SOURCE), ())
    with pytest.raises(PdctlError):
        await planner().unprepared(order, empty())


async def test_a_topology_with_options_is_obeyed_if_the_agent_allows_commands() -> None:
    order = Order(1, "a", TopologyEntry(TEXT + COMMANDS["env of group far"], SOURCE), ("far-0",))
    with pytest.raises(PdctlError, match="the topology sets env of group far"):
        await planner().unprepared(order, empty())
    plan = await planner(allow_commands=True).unprepared(order, empty())
    assert plan.processes[0].env["LD_PRELOAD"] == "/x.so"


def test_the_engines_that_a_topology_wants() -> None:
    assert engines_of(TopologyEntry(TEXT, SOURCE)) == ("prefill-0", "prefill-1", "decode-0")
    assert engines_of(None) == ()
    assert engines_of(TopologyEntry("x = ", SOURCE)) == ()


async def test_a_node_refuses_what_its_machine_has_not() -> None:
    wanted = TEXT.replace('role = "decode"', 'role = "decode"\ncpus = [9999]')
    assert wanted != TEXT
    order = Order(1, "a", TopologyEntry(wanted, SOURCE), ("decode-0",))
    with pytest.raises(PdctlError, match=r"the topology is wrong here: line \d+: CPU 9999 does not exist"):
        await planner().plan_of(order, empty())
    assert (await planner().plan_of(Order(1, "a", TopologyEntry(wanted, SOURCE), ("prefill-0",)), empty())).processes


async def test_a_published_topology_cannot_take_away_a_nodes_certificates() -> None:
    """Where they are, and whether there are any, is for the node's own file to say."""
    own = load_cluster_text(TEXT, SOURCE).cluster
    assert own is not None
    mine = replace(own, certificates="/etc/pdctl")
    planner = Planner("a", "127.0.0.2", mine, empty(), False, lambda name, message: None)
    plan = await planner.unprepared(Order(1, "a", TopologyEntry(TEXT, SOURCE), ("prefill-1",)), empty())
    assert plan.certificates == "/etc/pdctl"
    assert all(spec.tls for spec in plan.processes)
