"""Coordinators over the registry in memory, in virtual time: one at a time, orders, losses, and one that was asleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never

import msgspec
import pytest

from pdctl.host.facts import encode_facts
from pdctl.registry import Change, Created, Delete, Modified, Put, Unavailable
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.cluster.coordinator import Coordinator
from pdctl.supervisor.cluster.entries import WITHDRAWN, Keys, NodeEntry, Order, PlacementEntry, TopologyEntry
from pdctl.topology.spec import Cluster
from tests.news import News
from tests.topology.test_loader import GPUS, host
from tests.virtual_loop import VirtualLoop

pytestmark = pytest.mark.anyio
KEYS = Keys("service")
CLUSTER = Cluster(("http://e:2379",), "eth0", "/secret", ttl_s=5, node_lost_s=60.0)
TEXT = """
[service]
name = "service"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://e:2379"]
interface = "eth0"
secret_file = "secret"
[[engines]]
name = "prefill"
role = "prefill"
device = "cuda"
replicas = 2
[[engines]]
name = "decode"
role = "decode"
device = "cuda"
replicas = 2
"""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Line:
    """The registry as one agent reaches it: the line can be cut, and the agent can sleep before it writes."""

    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry
        self.is_cut = False
        # While True, writes of orders are not answered, and happen when `thaw` is called: their member is frozen.
        self.is_frozen = False
        self.kept: list[tuple[Sequence[Put | Delete], Sequence[Created | Modified]]] = []
        self.asleep, self.awake = asyncio.Event(), asyncio.Event()
        self.awake.set()
        self.list, self.close = registry.list, registry.close
        self.watch: Callable[..., Coroutine[Any, Any, Never]] = registry.watch

    async def _reach(self) -> MemoryRegistry:
        if not self.awake.is_set():
            self.asleep.set()
            await self.awake.wait()
        if self.is_cut:
            raise Unavailable("cut")
        return self._registry

    async def grant(self, ttl_s: int) -> int:
        return await (await self._reach()).grant(ttl_s)

    async def keep(self, lease: int) -> None:
        await (await self._reach()).keep(lease)

    async def revoke(self, lease: int) -> None:
        await (await self._reach()).revoke(lease)

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        if self.is_frozen and any(write.key.startswith(KEYS.desired) for write in writes):
            self.kept.append((writes, conditions))
            raise Unavailable("frozen")
        return await (await self._reach()).write(writes, conditions)

    async def thaw(self) -> None:
        kept, self.kept, self.is_frozen = self.kept, [], False
        for writes, conditions in kept:
            await self.write(writes, conditions)


def clock() -> float:
    return asyncio.get_running_loop().time()


class Rig(News):
    def __init__(self) -> None:
        super().__init__()
        self.registry = MemoryRegistry(clock=clock)
        self.said: list[str] = []
        self.orders: dict[str, Order] = {}
        self.placements: list[PlacementEntry] = []
        self.tasks: dict[str, asyncio.Task[object]] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.lines: dict[str, Line] = {}

    def seen(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            if change.entry is not None and change.key.startswith(KEYS.desired):
                order = msgspec.json.decode(change.entry.value, type=Order)
                self.orders[order.node] = order
            if change.entry is not None and change.key == KEYS.placement:
                self.placements.append(msgspec.json.decode(change.entry.value, type=PlacementEntry))
        self.tell()

    def say(self, node: str, sentence: str) -> None:
        self.said.append(f"{node}: {sentence}")
        self.tell()

    def start(self, group: asyncio.TaskGroup, node: str) -> Coordinator:
        line = self.lines[node] = Line(self.registry)
        made = Coordinator(line, KEYS, node, CLUSTER, lambda text: self.say(node, text), lambda failure: None, clock)
        self.coordinators[node] = made
        self.tasks[node] = group.create_task(made.run_forever())
        return made

    async def node(self, name: str, gpus: int) -> int:
        facts = msgspec.Raw(encode_facts(host(GPUS[:1] * gpus)))
        entry = NodeEntry(name, "10.0.0.1", "boot", "1", facts=facts)
        lease = await self.registry.grant(100_000)
        await self.registry.write([Put(KEYS.node(name), msgspec.json.encode(entry), lease)])
        return lease

    async def apply(self, text: str = TEXT) -> None:
        entry = TopologyEntry(text, "pdctl.toml")
        await self.registry.write([Put(KEYS.topology, msgspec.json.encode(entry))])

    @property
    def engines(self) -> dict[str, tuple[str, ...]]:
        return {node: order.engines for node, order in self.orders.items()}

    @property
    def count(self) -> int:
        return sum(map(len, self.engines.values()))


@asynccontextmanager
async def running(*nodes: str) -> AsyncIterator[Rig]:
    rig = Rig()
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(rig.registry.watch(KEYS.all, 0, rig.seen))
        for node in nodes:
            rig.start(tasks, node)
        yield rig
        for task in (watch, *rig.tasks.values()):
            task.cancel()


async def test_one_of_several_agents_coordinates_and_another_takes_over_when_it_is_gone() -> None:
    async with running("a", "b", "c") as rig:
        for name in ("a", "b", "c"):
            await rig.node(name, 2)
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        first = rig.said[0].partition(":")[0]
        assert [text.partition(":")[0] for text in rig.said] == [first]
        assert {made.holder for made in rig.coordinators.values()} == {first}
        rig.tasks[first].cancel()
        gone = clock()
        await rig.until(lambda: len(rig.said) == 2)
        second, _, sentence = rig.said[1].partition(": ")
        assert second != first
        assert sentence.startswith("this node coordinates the cluster (term ")
        assert 3 < clock() - gone < 7
        # Nobody has moved, and nothing is written anew.
        await asyncio.sleep(120)
        assert {order.term for order in rig.orders.values()} == {rig.placements[0].term}


@pytest.mark.parametrize("ticks", range(12))
async def test_a_coordinator_that_loses_its_key_while_it_is_cancelled_ends(ticks: int) -> None:
    """An agent that stops does both: its failure must not hide the other."""
    async with running("a") as rig:
        await rig.until(lambda: len(rig.said) == 1)
        await rig.coordinators["a"].leave()
        for _ in range(ticks):
            await asyncio.sleep(0)
        rig.tasks["a"].cancel()
        await asyncio.wait([rig.tasks["a"]], timeout=60)
        assert rig.tasks["a"].cancelled()


@pytest.mark.parametrize("after_s", [0.0, 0.5, 2.0])
async def test_a_coordinator_that_leaves_does_not_come_back_and_can_be_cancelled(after_s: float) -> None:
    """Also while it still ends what it did as a coordinator: a connection takes a while to close."""
    async with running("a") as rig:

        async def watch(*given: Any) -> Never:
            try:
                await rig.registry.watch(*given)
            finally:
                await asyncio.sleep(1)
            raise AssertionError("a watch does not end by itself")

        rig.lines["a"].watch = watch
        await rig.until(lambda: len(rig.said) == 1)
        await rig.coordinators["a"].leave()
        await asyncio.sleep(after_s)
        rig.tasks["a"].cancel()
        await asyncio.wait([rig.tasks["a"]], timeout=60)
        assert rig.tasks["a"].cancelled()
        assert [text for text in rig.said if "this node coordinates" in text] == rig.said[:1]


async def test_a_coordinator_that_leaves_is_followed_at_once() -> None:
    async with running("a", "b") as rig:
        await rig.until(lambda: len(rig.said) == 1)
        first = rig.said[0].partition(":")[0]
        rig.tasks[first].cancel()
        await rig.coordinators[first].leave()
        left = clock()
        await rig.until(lambda: len(rig.said) == 2)
        assert clock() - left < 2


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_member_that_thaws_brings_back_no_orders(is_early: bool) -> None:
    """Early: they happen before the next decision, and are seen. Late: after it, and fail."""
    async with running("a") as rig:
        for name in ("a", "b"):
            await rig.node(name, 4)
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        line = rig.lines["a"]
        line.is_frozen = True
        await rig.apply(TEXT.replace("replicas = 2", "replicas = 1"))
        while not line.kept:
            await asyncio.sleep(0.1)
        if is_early:
            await line.thaw()
        line.is_frozen = False
        await rig.apply()
        await asyncio.sleep(30)
        assert rig.count == 4
        await line.thaw()
        await asyncio.sleep(30)
        assert rig.count == 4
        assert len(rig.said) == 1, "the same agent coordinates all the time"


async def test_a_topology_that_is_withdrawn_leaves_nothing_to_run() -> None:
    async with running("a") as rig:
        await rig.node("a", 4)
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        await rig.registry.write([Put(KEYS.topology, msgspec.json.encode(WITHDRAWN))])
        await rig.until(lambda: rig.count == 0)
        assert rig.orders["a"].topology is None
        assert rig.placements[-1].problem == ""


async def test_a_lost_node_s_engines_go_elsewhere_and_everyone_can_read_what_happened() -> None:
    async with running("a", "b") as rig:
        leases = {name: await rig.node(name, 2) for name in ("a", "b", "c")}
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        victim = next(node for node, names in rig.engines.items() if len(names) == 1)
        before = rig.engines
        await rig.registry.revoke(leases[victim])
        gone = clock()
        await rig.until(lambda: rig.placements[-1].away == (victim,))
        await rig.until(lambda: rig.placements[-1].lost == (victim,))
        assert 60 <= clock() - gone < 61
        assert rig.engines[victim] == ()
        assert rig.count == 4
        assert all({*before[node]} <= {*rig.engines[node]} for node in before if node != victim)
        await rig.until(lambda: all(made.placement == rig.placements[-1] for made in rig.coordinators.values()))
        await rig.node(victim, 2)
        await rig.until(lambda: rig.placements[-1].lost == ())
        assert [text.partition(": ")[2] for text in rig.said[1:]] == [
            f"the registry tells nothing of node {victim}; it keeps its engines for now",
            f"node {victim} is lost: its engines are placed elsewhere",
            f"node {victim} is back",
        ]


async def test_without_room_the_reason_is_told_and_orders_come_when_there_is_room() -> None:
    async with running("a") as rig:
        await rig.node("a", 1)
        await rig.apply()
        await rig.until(lambda: bool(rig.placements) and bool(rig.placements[-1].problem))
        assert rig.placements[-1].problem.startswith("no node has 1 free GPU for prefill-1; free: a 0 of 1")
        assert rig.said[-1].startswith("a: no node has 1 free GPU")
        assert rig.orders == {}
        await rig.node("b", 3)
        await rig.until(lambda: rig.count == 4)
        await rig.until(lambda: rig.placements[-1].problem == "")
        await rig.registry.write([Delete(KEYS.topology)])
        await rig.until(lambda: all(order.topology is None for order in rig.orders.values()))
        assert rig.count == 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"{}", "the topology in the registry is not readable"),
        (msgspec.json.encode(TopologyEntry("[service]\nnam = 1", "f.toml")), "f.toml: engines: no engines"),
        (msgspec.json.encode(TopologyEntry("[", "f.toml")), "f.toml:1: topology: not TOML"),
    ],
)
async def test_a_topology_that_is_not_understood_changes_nothing(value: bytes, problem: str) -> None:
    async with running("a") as rig:
        await rig.node("a", 4)
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        await rig.registry.write([Put(KEYS.topology, value)])
        await rig.until(lambda: bool(rig.placements[-1].problem))
        assert problem in rig.placements[-1].problem
        assert rig.count == 4


async def test_a_coordinator_that_was_cut_off_writes_nothing_and_waits_like_any_other() -> None:
    async with running("a", "b") as rig:
        await rig.node("a", 4)
        await rig.until(lambda: len(rig.said) == 1)
        first = rig.said[0].partition(":")[0]
        other = "b" if first == "a" else "a"
        rig.lines[first].is_cut = True
        await rig.until(lambda: rig.said[-1].startswith(f"{other}: this node coordinates"))
        await rig.until(lambda: any(text.startswith(f"{first}: this node does not coordinate") for text in rig.said))
        rig.lines[first].is_cut = False
        await rig.apply()
        await rig.until(lambda: rig.count == 4)
        await asyncio.sleep(30)
        assert rig.placements[-1].node == other
        assert {order.term for order in rig.orders.values()} == {rig.placements[-1].term}
        assert rig.coordinators[first].holder == other


async def test_a_write_of_a_coordinator_that_slept_too_long_is_refused() -> None:
    """It wakes up in the middle of a decision, and knows nothing of the other one."""
    async with running("a", "b") as rig:
        await rig.node("a", 4)
        await rig.until(lambda: len(rig.said) == 1)
        first = rig.said[0].partition(":")[0]
        other = "b" if first == "a" else "a"
        line = rig.lines[first]
        line.awake.clear()
        await rig.apply()
        await line.asleep.wait()
        await rig.until(lambda: rig.said[-1].startswith(f"{other}: this node coordinates"))
        await rig.until(lambda: rig.count == 4)
        assert {order.term for order in rig.orders.values()} == {rig.placements[-1].term}
        await rig.registry.write([Delete(KEYS.order("a"))])
        line.awake.set()
        await rig.until(lambda: rig.said[-1].startswith(f"{first}: this node does not coordinate the cluster any more"))
        assert (await rig.registry.list(KEYS.desired)).entries == ()


async def test_after_a_refusal_it_hears_that_the_key_is_free() -> None:
    async with running("a") as rig:
        await rig.until(lambda: len(rig.said) == 1)
        made = rig.coordinators["a"]
        rig.tasks["a"].cancel()
        await asyncio.sleep(10)
        async with asyncio.TaskGroup() as tasks:
            again = tasks.create_task(made.run_forever())
            await rig.until(lambda: len(rig.said) == 2)
            again.cancel()
        assert rig.said[1].startswith("a: this node coordinates the cluster")
