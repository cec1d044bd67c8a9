"""What a node does with orders: the newest one of a coordinator that still counts, and each only once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.registry import Delete, Put
from pdctl.registry.memory import MemoryRegistry
from pdctl.supervisor.agent.orders import Orders
from pdctl.supervisor.agent.turns import Turns
from pdctl.supervisor.cluster.entries import Keys, Order, TopologyEntry
from pdctl.supervisor.service.change.apply import Progress
from tests.news import News
from tests.supervisor.fleet import child, plan_of

pytestmark = pytest.mark.anyio
KEYS = Keys("service")
TOPOLOGY = TopologyEntry("text", "/x/pdctl.toml")


def plan(*names: str) -> Plan:
    """A plan with these engines."""
    return plan_of(Path("/nowhere"), *(child(name, "true", ports={}) for name in names))


class Rig(News):
    """A service whose plan is only the engines' names. `busy`: why an apply is refused; `fails`: how it ends."""

    def __init__(self, state_dir: Path, again_s: float = 5.0) -> None:
        super().__init__()
        self.registry = MemoryRegistry()
        self.plan: Plan = plan()
        self.applied: Progress | None = None
        self.asked: list[tuple[str, ...]] = []
        self.told: list[str | None] = []
        self.busy: list[str] = []
        self.fails = ""
        self.wrong: set[str] = set()
        self.restarted: dict[str, str] = {}
        self.waited: list[str] = []
        turns = Turns(self.registry, KEYS, "a", 5, self._waits, look_s=0.01)
        self.orders = Orders(
            self.registry, KEYS, "a", self.plan_of, self._tell, lambda failure: None, turns, state_dir, again_s
        )

    def _waits(self, node: str) -> None:
        self.waited.append(node)
        self.tell()

    def _tell(self, reason: str | None) -> None:
        self.told.append(reason)
        self.tell()

    async def plan_of(self, order: Order, running: Plan) -> Plan:
        assert running is self.plan
        if self.wrong & set(order.engines):
            raise PdctlError("no room")
        return plan(*order.engines)

    def changes(self, wanted: Plan) -> Changes:
        return Changes() if wanted == self.plan else Changes(added=("x",), restarted=self.restarted)

    def apply(self, wanted: Plan) -> str:
        if self.busy:
            return self.busy.pop(0)
        self.asked.append(tuple(spec.name for spec in wanted.processes))
        self.plan = wanted
        self.applied = Progress("failed" if self.fails else "done", error=self.fails)
        return ""

    async def until_applied(self) -> None:
        await asyncio.sleep(0)

    async def order(self, term: int, *engines: str, node: str = "a") -> None:
        order = Order(term, node, TOPOLOGY, engines)
        await self.registry.write([Put(KEYS.order(node), msgspec.json.encode(order))])


@asynccontextmanager
async def obeying(rig: Rig) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.orders.run_forever(rig))
        yield rig
        task.cancel()


async def test_the_order_that_is_there_and_newer_ones_are_obeyed(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.order(5, "prefill-0")
    async with obeying(rig):
        await rig.until(lambda: rig.asked == [("prefill-0",)])
        await rig.order(5, "prefill-0", "decode-0")
        await rig.until(lambda: rig.asked == [("prefill-0",), ("prefill-0", "decode-0")])


async def test_an_order_that_changes_nothing_is_no_apply(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    async with obeying(rig):
        await rig.order(5, "prefill-0")
        await rig.until(lambda: rig.told == [None])
        await rig.order(6, "prefill-0")
        await rig.until(lambda: rig.told == [None, None])
    assert rig.asked == [("prefill-0",)]


async def test_an_earlier_coordinator_is_not_obeyed_not_even_after_a_restart(tmp_path: Path) -> None:
    async with obeying(Rig(tmp_path)) as rig:
        await rig.order(7, "prefill-0")
        await rig.until(lambda: len(rig.asked) == 1)
    again = Rig(tmp_path)
    await again.order(6, "decode-0")
    async with obeying(again):
        await again.order(7, "decode-1")
        await again.until(lambda: again.asked == [("decode-1",)])


async def test_orders_of_another_node_with_a_longer_name_are_not_ours(tmp_path: Path) -> None:
    async with obeying(Rig(tmp_path)) as rig:
        await rig.order(5, "decode-9", node="a2")
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.asked == [("decode-0",)])


async def test_a_deleted_order_stops_nothing(tmp_path: Path) -> None:
    async with obeying(Rig(tmp_path)) as rig:
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.asked == [("decode-0",)])
        await rig.registry.write([Delete(KEYS.order("a"))])
        await rig.order(5, "decode-1")
        await rig.until(lambda: rig.asked[-1] == ("decode-1",))
    assert len(rig.asked) == 2


async def test_an_apply_of_somebody_else_is_waited_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.busy = ["another apply is in progress: adding x"] * 2
    async with obeying(rig):
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.told[-1:] == [None])
    assert rig.told == ["waiting: another apply is in progress: adding x"] * 2 + [None]


@pytest.mark.parametrize("how", ["no room", "decode-0 failed"])
async def test_why_an_order_is_not_carried_out_is_told_and_the_next_one_counts(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path)
    rig.wrong, rig.fails = ({"decode-0"}, "") if how == "no room" else (set(), how)
    async with obeying(rig):
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.told == [how])
        rig.wrong, rig.fails = set(), ""
        await rig.order(5, "decode-1")
        await rig.until(lambda: rig.told == [how, None])


@pytest.mark.parametrize("how", ["no room", "decode-0 failed"])
async def test_an_order_that_could_not_be_carried_out_is_tried_again(tmp_path: Path, how: str) -> None:
    """Nobody may give another order for hours: the GPU that was in use is free long before."""
    rig = Rig(tmp_path, again_s=0.01)
    rig.wrong, rig.fails = ({"decode-0"}, "") if how == "no room" else (set(), how)
    rig.restarted = {}
    async with obeying(rig):
        await rig.order(5, "decode-0")
        await rig.until(lambda: bool(rig.told))
        if how != "no room":
            rig.plan = plan()
        rig.wrong, rig.fails = set(), ""
        await rig.until(lambda: rig.told[-1] is None)
    assert rig.plan == plan("decode-0")
    assert set(rig.told[:-1]) == {how}


async def test_orders_of_an_earlier_term_are_told_with_what_to_do(tmp_path: Path) -> None:
    """The term of an etcd that was set up anew begins again: the node would obey nothing, and nobody would know why."""
    async with obeying(Rig(tmp_path)) as rig:
        await rig.order(7, "prefill-0")
        await rig.until(lambda: rig.told == [None])
        await rig.order(6, "decode-0")
        await rig.until(lambda: len(rig.told) == 2)
    assert rig.asked == [("prefill-0",)]
    told = rig.told[1]
    assert told is not None
    assert told.startswith("the order is of term 6, but term 7 was seen")
    assert f"remove {tmp_path / 'term'} and start the agent again" in told


async def test_an_order_that_is_no_order_is_told(tmp_path: Path) -> None:
    async with obeying(Rig(tmp_path)) as rig:
        await rig.registry.write([Put(KEYS.order("a"), b'{"term":"x"}')])
        await rig.until(lambda: bool(rig.told))
    assert rig.told[0] is not None
    assert rig.told[0].startswith("the order in /pdctl/service/desired/a is not understood: ")


class Elsewhere:
    """Another node that restarts something until it is told to end."""

    def __init__(self, rig: Rig) -> None:
        self.begun, self.end = asyncio.Event(), asyncio.Event()
        self._turns = Turns(rig.registry, KEYS, "b", 5, lambda node: None, look_s=0.01)

    async def run(self) -> None:
        await self._turns.act(self._act, lambda: False)

    async def _act(self) -> None:
        self.begun.set()
        await self.end.wait()


@asynccontextmanager
async def restarting(rig: Rig) -> AsyncIterator[Elsewhere]:
    elsewhere = Elsewhere(rig)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(elsewhere.run())
        await elsewhere.begun.wait()
        yield elsewhere
        elsewhere.end.set()


async def test_restarts_wait_for_those_of_another_node(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.restarted = {"decode-0": "args changed"}
    async with obeying(rig):
        async with restarting(rig):
            await rig.order(5, "decode-0")
            await rig.until(lambda: rig.waited == ["b"])
            assert rig.asked == []
        await rig.until(lambda: rig.told == [None])
        assert rig.asked == [("decode-0",)]
    assert (await rig.registry.list(KEYS.turn)).entries == ()


async def test_a_newer_order_is_not_kept_by_one_that_waits(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.restarted = {"decode-0": "args changed"}
    async with obeying(rig), restarting(rig):
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.waited == ["b"])
        rig.restarted = {}
        await rig.order(5, "decode-1")
        await rig.until(lambda: rig.asked == [("decode-1",)])


async def test_a_restart_that_fails_is_told_and_ends_the_turn(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.restarted, rig.fails = {"decode-0": "args changed"}, "decode-0 failed"
    async with obeying(rig):
        await rig.order(5, "decode-0")
        await rig.until(lambda: rig.told == ["decode-0 failed"])
        assert (await rig.registry.list(KEYS.turn)).entries == ()


async def test_nodes_take_turns() -> None:
    registry, running, most = MemoryRegistry(), 0, 0

    async def restart() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(8):
            turns = Turns(registry, KEYS, f"n{number}", 5, lambda other: None, look_s=0.001)
            tasks.create_task(turns.act(restart, lambda: False))
    assert (running, most) == (0, 1)
    assert (await registry.list(KEYS.turn)).entries == ()
