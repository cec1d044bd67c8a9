"""What a coordinator decides: who is there, away, lost; what stays, moves, or has no room."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.errors import PdctlError
from pdctl.plan.placement import Room, Wish
from pdctl.supervisor.cluster.assignments import Assignments, Decision, Wanted, orders_of
from pdctl.supervisor.cluster.entries import Order, TopologyEntry
from pdctl.topology.spec import Cluster

LOST_S = 60.0
CLUSTER = Cluster(("http://e:2379",), "eth0", "/secret")


def wanted(prefills: int, decodes: int, text: str = "t1", spare: int = 0) -> Wanted:
    wishes = [Wish(f"prefill-{n}", "prefill", "prefill", 1) for n in range(prefills)]
    wishes += [Wish(f"decode-{n}", "decode", "decode", 1) for n in range(decodes)]
    return Wanted(TopologyEntry(text, "f.toml"), tuple(wishes), replace(CLUSTER, spare_nodes=spare))


class Service:
    """A coordinator with the orders that it has written."""

    def __init__(self, rooms: dict[str, int], what: Wanted | None = None) -> None:
        self.orders: dict[str, Order] = {}
        self.term = 0
        self.take_over(0.0)
        for node, gpus in rooms.items():
            self.books.is_there(node, Room(gpus, cell=what.cluster.cell_of(node) if what and what.cluster else ""))
        self.books.wants(what)
        self.decide(0.0)

    def take_over(self, now: float) -> None:
        self.term += 1
        self.books = Assignments(self.term, "a", LOST_S, self.orders.values(), now)

    def decide(self, now: float) -> Decision:
        decision = self.books.decide(now)
        self.orders |= {order.node: order for order in decision.orders}
        self.books.wrote(decision.orders)
        return decision

    @property
    def engines(self) -> dict[str, list[str]]:
        return {node: [*order.engines] for node, order in self.orders.items() if order.engines}


def test_a_node_that_vanishes_keeps_its_engines_until_it_is_lost() -> None:
    service = Service({"a": 2, "b": 2, "c": 2}, wanted(2, 2))
    before = service.engines
    assert sorted(map(len, before.values())) == [1, 1, 2]
    service.books.vanished("b", 10.0)
    decision = service.decide(69.9)
    assert (decision.orders, decision.placement.away, decision.placement.lost) == ((), ("b",), ())
    assert service.books.next_loss(10.0) == 70.0
    decision = service.decide(70.0)
    assert decision.placement.lost == ("b",)
    assert {order.node for order in decision.orders} >= {"b"}
    assert "b" not in service.engines
    assert sorted(name for names in service.engines.values() for name in names) == [
        "decode-0", "decode-1", "prefill-0", "prefill-1",
    ]  # fmt: skip
    assert all(set(before[node]) <= set(service.engines[node]) for node in ("a", "c"))
    service.books.is_there("b", Room(2))
    decision = service.decide(80.0)
    assert (decision.orders, decision.placement.lost) == ((), ())


def test_a_new_coordinator_counts_from_its_own_start_and_writes_nothing_that_is_written() -> None:
    service = Service({"a": 2, "b": 2}, wanted(1, 1))
    service.books.vanished("b", 10.0)
    service.take_over(60.0)
    service.books.is_there("a", Room(2))
    service.books.wants(wanted(1, 1))
    assert service.decide(119.0).orders == ()
    assert service.books.next_loss(60.0) == 120.0
    assert {order.term for order in service.decide(120.0).orders} == {2}
    assert service.engines == {"a": ["prefill-0", "decode-0"]}


def test_without_room_the_lost_engines_stay_in_the_order_of_their_node_and_all_others_run() -> None:
    service = Service({"a": 3, "b": 2, "c": 1}, wanted(2, 3))
    there = {*service.engines["b"]}
    service.books.vanished("b", 0.0)
    placement = service.decide(100.0).placement
    assert placement.problem.startswith(f"no node has 1 free GPU for {placement.unplaced[0]}; free: a 0 of 3")
    assert placement.hint == "lower replicas, or add a node"
    assert len(placement.unplaced) == 1
    assert service.engines["b"] == [*placement.unplaced]
    assert sum(map(len, service.engines.values())) == 5
    service.books.is_there("d", Room(1))
    placement = service.decide(110.0).placement
    assert (placement.problem, placement.unplaced) == ("", ())
    assert service.engines["d"][0] in there


def test_a_new_topology_that_does_not_fit_changes_nothing() -> None:
    service = Service({"a": 2, "b": 2}, wanted(2, 2))
    before = service.engines
    service.books.wants(wanted(2, 3, "t2"))
    decision = service.decide(1.0)
    assert decision.orders == ()
    assert "no node has 1 free GPU for decode-2" in decision.placement.problem
    service.books.wants(wanted(2, 2, "t3", spare=1))
    assert service.decide(2.0).placement.problem.startswith("without a, no node has 1 free GPU")
    assert service.engines == before
    service.books.cannot_read(PdctlError("f.toml:3: engines[0].kind: unknown", "update pdctl"))
    placement = service.decide(3.0).placement
    assert (placement.problem, placement.hint) == ("f.toml:3: engines[0].kind: unknown", "update pdctl")
    assert service.engines == before


def test_spare_room_is_used_when_it_is_needed() -> None:
    service = Service({"a": 4, "b": 4, "c": 4}, wanted(4, 4, spare=1))
    assert sum(map(len, service.engines.values())) == 8
    service.books.vanished("c", 0.0)
    assert service.decide(60.0).placement.problem == ""
    assert {node: len(names) for node, names in service.engines.items()} == {"a": 4, "b": 4}


def test_removing_the_topology_empties_the_orders() -> None:
    service = Service({"a": 2, "b": 2, "c": 0}, wanted(1, 1))
    assert service.orders.keys() == {"a", "b", "c"}
    service.books.vanished("b", 5.0)
    service.books.wants(None)
    assert {order.node for order in service.decide(6.0).orders} == {"a", "b", "c"}
    assert all(order.topology is None and not order.engines for order in service.orders.values())
    service.books.is_there("d", Room(8))
    assert service.decide(7.0).orders == ()


def test_nodes_that_vanish_at_one_instant_keep_everything_as_it_is() -> None:
    service = Service({"a": 2, "b": 2, "c": 2, "d": 2}, wanted(2, 2))
    service.books.vanished("b", 10.0)
    service.books.vanished("c", 10.5)
    service.books.wants(wanted(1, 1, "t2"))
    decision = service.decide(11.0)
    assert decision.orders == ()
    assert decision.placement.problem == "2 of 4 nodes vanished at one instant: nothing is moved until they are back"
    service.books.is_there("b", Room(2))
    service.books.is_there("c", Room(2))
    assert service.decide(12.0).placement.problem == ""
    assert sum(map(len, service.engines.values())) == 2


def test_nodes_that_vanish_at_one_instant_are_lost_in_the_end() -> None:
    service = Service({"a": 4, "b": 2, "c": 2}, wanted(2, 2))
    service.books.vanished("b", 10.0)
    service.books.vanished("c", 10.0)
    assert service.decide(69.0).placement.lost == ()
    assert service.decide(70.0).placement.lost == ("b", "c")
    assert service.engines.keys() == {"a"}


def test_engines_of_a_lost_node_stay_in_its_cell_and_a_cell_without_a_role_is_told() -> None:
    what = wanted(2, 2)
    what = replace(what, cluster=replace(CLUSTER, cells=("x*", "y*")))
    service = Service({"x1": 1, "x2": 1, "x3": 2, "y1": 2, "y2": 0}, what)
    assert {node[0]: len(names) for node, names in service.engines.items() if node[0] == "y"} == {"y": 2}
    roles = {cell: {name.split("-")[0] for node, names in service.engines.items() if node[0] == cell for name in names}
             for cell in "xy"}  # fmt: skip
    assert roles == {"x": {"prefill", "decode"}, "y": {"prefill", "decode"}}
    before = service.engines["x3"] if "x3" in service.engines else service.engines["x1"]
    victim = next(node for node, names in service.engines.items() if names == before)
    service.books.vanished(victim, 0.0)
    placement = service.decide(100.0).placement
    assert placement.problem == ""
    assert {name for node, names in service.engines.items() if node[0] == "x" for name in names} >= {*before}


def test_a_node_that_counts_itself_to_another_cell_keeps_its_engines_and_gets_no_more() -> None:
    service = Service({"x1": 2, "x2": 2}, wanted(1, 1))
    before = service.engines
    service.books.is_there("x2", Room(2, cell="rack*"))
    what = wanted(2, 2, "t2")
    service.books.wants(what)
    placement = service.decide(1.0).placement
    assert placement.problem.startswith("no node has 1 free GPU")
    service.books.is_there("x1", Room(8))
    placement = service.decide(2.0).placement
    assert placement.problem == "node x2 counts itself to cell 'rack*', and the topology to '': it gets no engines"
    assert service.engines["x2"] == before["x2"]
    assert sum(map(len, service.engines.values())) == 4


def test_a_node_of_another_version_keeps_its_engines_and_gets_no_more() -> None:
    service = Service({"a": 2, "b": 2}, wanted(1, 1))
    before = service.engines
    service.books.is_there("b", None)
    assert service.decide(1.0).orders == ()
    service.books.wants(wanted(2, 1, "t2"))
    service.decide(2.0)
    assert service.engines["b"] == before["b"]
    assert service.engines["a"] == [*before["a"], "prefill-1"]


def test_orders_of_other_versions_are_left_out() -> None:
    order = Order(3, "a", TopologyEntry("t", "f"), ("x-0",))
    assert orders_of([b"{}", b"\xff", msgspec.json.encode(order)]) == [order]


class Terms(RuleBasedStateMachine):
    """Whatever comes and goes: engines of nodes that are not lost stay, no GPU is given twice, nothing is left out that
    has room, and a decision that was written needs no second one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.service = Service({}, None)
        self.there: dict[str, int] = {}
        self.since: dict[str, float] = {}
        self.texts = itertools.count()
        self.what: Wanted | None = None

    @rule(node=st.sampled_from("abcd"), gpus=st.sampled_from([1, 2, 4]))
    def come(self, node: str, gpus: int) -> None:
        self.there[node] = gpus
        self.since.pop(node, None)
        self.service.books.is_there(node, Room(gpus))

    @rule(nodes=st.sets(st.sampled_from("abcd"), min_size=1, max_size=3))
    def vanish(self, nodes: set[str]) -> None:
        for node in nodes & self.there.keys():
            del self.there[node]
            self.since[node] = self.now
            self.service.books.vanished(node, self.now)

    @rule(seconds=st.sampled_from([0.5, 5.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(prefills=st.integers(1, 3), decodes=st.integers(1, 3), spare=st.integers(0, 1))
    def change(self, prefills: int, decodes: int, spare: int) -> None:
        self.what = wanted(prefills, decodes, f"t{next(self.texts)}", spare)
        self.service.books.wants(self.what)

    @rule()
    def stop(self) -> None:
        self.what = None
        self.service.books.wants(None)

    @rule()
    def take_over(self) -> None:
        self.service.take_over(self.now)
        for node, gpus in self.there.items():
            self.service.books.is_there(node, Room(gpus))
        self.service.books.wants(self.what)
        self.since = {node: self.now for node in self.service.orders if node not in self.there}

    @rule(written=st.integers(0, 4))
    def decide(self, written: int) -> None:
        before = {name: node for node, names in self.service.engines.items() for name in names}
        decision = self.service.books.decide(self.now)
        kept = {node for node, since in self.since.items() if self.now - since < LOST_S} | self.there.keys()
        new = {**self.service.orders, **{order.node: order for order in decision.orders}}
        names = {wish.name for wish in self.what.wishes} if self.what is not None else set()
        now = {name: order.node for order in new.values() for name in order.engines}
        for name, node in before.items():
            room = node in self.since or self.there[node] >= len(self.service.engines[node])
            if node in kept and name in names and room:
                assert now[name] == node, f"{name} has moved from {node}"
        if written < len(decision.orders):
            # The coordinator dies while it writes.
            self.service.orders |= {order.node: order for order in decision.orders[:written]}
            self.take_over()
            return
        self.service.orders = new
        self.service.books.wrote(decision.orders)
        again = self.service.books.decide(self.now)
        assert (again.orders, again.placement) == ((), decision.placement)
        if not decision.placement.problem:
            self.all_is_placed_once(names)

    def all_is_placed_once(self, names: set[str]) -> None:
        counts = Counter(name for order in self.service.orders.values() for name in order.engines)
        assert counts == Counter(names)
        for node, gpus in self.there.items():
            assert len(self.service.engines.get(node, [])) <= gpus

    @invariant()
    def books_are_right(self) -> None:
        self.service.books.audit()


TestTerms = Terms.TestCase
