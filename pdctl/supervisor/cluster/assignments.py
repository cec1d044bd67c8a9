"""What the coordinator decides: which nodes are there, away or lost, and what each is to run. Pure: news and times in,
orders out.

A node that vanishes from the registry keeps its engines for `lost_s`; then they are placed elsewhere. A coordinator
knows nothing of what was before its term but the orders: it counts that time from its own start. Many nodes that vanish
at one instant are the registry's fault, not theirs: nothing is moved until they are back or lost.

A new topology is taken as a whole, or not at all. Later, when nodes are lost, engines without room stay in the order of
their lost node, and all others run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from pdctl.errors import PdctlError
from pdctl.plan.placement import Places, Room, Wish, check_cells, check_spare, fit
from pdctl.supervisor.cluster.entries import Order, PlacementEntry, TopologyEntry
from pdctl.topology.spec import Cluster

# More than this part of all nodes that vanish within so many seconds: the registry's fault.
_MASS_PART, _MASS_S = 1 / 3, 1.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The topology that is to run, and what its engines need. `cluster`: what it says of nodes."""

    topology: TopologyEntry
    wishes: tuple[Wish, ...] = ()
    cluster: Cluster | None = None


@dataclass(slots=True)
class _Away:
    """A node of which the registry tells nothing. `vanished`: it did so in this term."""

    since: float
    vanished: bool
    in_mass: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """`orders`: those that must be written; `placement`: what to tell of it."""

    orders: tuple[Order, ...]
    placement: PlacementEntry


class Assignments:
    """The books of one term of the coordinator that runs on `node`. `orders`: those that earlier terms have left."""

    def __init__(self, term: int, node: str, lost_s: float, orders: Iterable[Order], now: float) -> None:
        self._term = term
        self._node = node
        self._lost_s = lost_s
        self._orders = {order.node: order for order in orders}
        # Nodes that are there; None: what they have is not known, as after an update of pdctl.
        self._rooms: dict[str, Room | None] = {}
        self._away = {name: _Away(now, vanished=False) for name in self._orders}
        self._wanted: Wanted | None = None
        self._unread: PdctlError | None = None

    def is_there(self, node: str, room: Room | None) -> None:
        """The registry tells of a node."""
        self._away.pop(node, None)
        self._rooms[node] = room

    def vanished(self, node: str, now: float) -> None:
        """The registry tells of a node no more."""
        if node in self._rooms:
            del self._rooms[node]
            self._away[node] = _Away(now, vanished=True)
            self._see_mass(now)

    def wants(self, wanted: Wanted | None) -> None:
        """The topology that is to run; None: nothing."""
        self._wanted, self._unread = wanted, None

    def cannot_read(self, failure: PdctlError) -> None:
        """There is a topology that this version does not understand."""
        self._wanted, self._unread = None, failure

    def wrote(self, orders: Iterable[Order]) -> None:
        """These orders are in the registry."""
        self._orders |= {order.node: order for order in orders}

    def next_loss(self, now: float) -> float | None:
        """When the next node that is away is lost; None: no node is."""
        ends = [away.since + self._lost_s for away in self._away.values()]
        return min((end for end in ends if end > now), default=None)

    def decide(self, now: float) -> Decision:
        """What is to be written now."""
        lost = {name for name, away in self._away.items() if now - away.since >= self._lost_s}
        waiting = self._away.keys() - lost
        mass = [name for name in waiting if self._away[name].in_mass]
        if self._unread is not None:
            return self._stay(self._unread, waiting, lost)
        if mass:
            count = len(self._rooms) + len(waiting)
            message = f"{len(mass)} of {count} nodes vanished at one instant: nothing is moved until they are back"
            return self._stay(PdctlError(message, "look at the registry (etcd), and at the network"), waiting, lost)
        if self._wanted is None:
            return self._decision({}, None, self._say(waiting, lost))
        return self._place(self._wanted, waiting, lost)

    def audit(self) -> None:
        """Check the books: a node is there or away."""
        assert not self._rooms.keys() & self._away.keys(), "a node is both there and away"
        assert self._orders.keys() <= self._rooms.keys() | self._away.keys(), "a node with an order is not known"

    def _place(self, wanted: Wanted, waiting: set[str], lost: set[str]) -> Decision:
        before = self._before()
        rooms = {name: room for name, room in self._rooms.items() if room is not None}
        strange = _strange(rooms, wanted.cluster)
        rooms = {name: room for name, room in rooms.items() if name not in strange}
        stay = {*waiting, *(name for name in self._rooms if name not in rooms)}
        pinned = {
            wish.name: node for wish in wanted.wishes if (node := before.get(wish.name, "")) in stay and
            wish.may_run_on(node)
        }  # fmt: skip
        free = [wish for wish in wanted.wishes if wish.name not in pinned]
        places = fit(free, rooms, before)
        is_known = any(order.topology == wanted.topology for order in self._orders.values())
        if not is_known and (refusal := _refusal(free, rooms, places, wanted.cluster)) is not None:
            return self._stay(refusal, waiting, lost)
        nodes = {**pinned, **places.nodes}
        for name in places.failures:
            # Should its node come back, it is still to run there.
            if before.get(name, "") in lost:
                nodes[name] = before[name]
        engines = {wish.name: nodes[wish.name] for wish in wanted.wishes if wish.name in nodes}
        failure = next(iter(places.failures.values()), None) or _lonely(wanted.wishes, nodes, wanted.cluster)
        failure = failure or next(iter(strange.values()), None)
        said = self._say(waiting, lost, failure, tuple(places.failures))
        return self._decision(engines, wanted.topology, said)

    def _before(self) -> dict[str, str]:
        """Where engines are, by the orders. An engine that is in two of them is where it can run now."""
        orders = sorted(self._orders.values(), key=lambda order: (order.node in self._rooms, order.node))
        return {engine: order.node for order in orders for engine in order.engines}

    def _decision(self, nodes: Mapping[str, str], topology: TopologyEntry | None, said: PlacementEntry) -> Decision:
        engines: dict[str, list[str]] = {name: [] for name in self._orders}
        if topology is not None:
            # A node without engines may have a proxy.
            engines |= {name: [] for name in self._rooms}
        for engine, node in nodes.items():
            engines[node].append(engine)
        orders = [Order(self._term, node, topology, tuple(names)) for node, names in sorted(engines.items())]
        return Decision(tuple(order for order in orders if not self._has(order)), said)

    def _has(self, order: Order) -> bool:
        held = self._orders.get(order.node)
        return held is not None and (held.topology, held.engines) == (order.topology, order.engines)

    def _stay(self, failure: PdctlError, waiting: set[str], lost: set[str]) -> Decision:
        return Decision((), self._say(waiting, lost, failure))

    def _say(
        self, waiting: set[str], lost: set[str], failure: PdctlError | None = None, unplaced: tuple[str, ...] = ()
    ) -> PlacementEntry:
        problem, hint = (failure.message, failure.hint or "") if failure is not None else ("", "")
        return PlacementEntry(
            self._term, self._node, problem, hint, unplaced, tuple(sorted(waiting)), tuple(sorted(lost))
        )

    def _see_mass(self, now: float) -> None:
        fresh = [away for away in self._away.values() if away.vanished and now - away.since < _MASS_S]
        if len(fresh) > 1 and len(fresh) > _MASS_PART * (len(self._rooms) + len(fresh)):
            for away in fresh:
                away.in_mass = True


def _refusal(
    wishes: Sequence[Wish], rooms: Mapping[str, Room], places: Places, cluster: Cluster | None
) -> PdctlError | None:
    """Why a new topology cannot run as a whole."""
    if places.failures:
        return next(iter(places.failures.values()))
    try:
        check_spare(wishes, rooms, places.nodes, cluster.spare_nodes if cluster is not None else 0)
    except PdctlError as failure:
        return failure
    return _lonely(wishes, places.nodes, cluster)


def _strange(rooms: Mapping[str, Room], cluster: Cluster | None) -> dict[str, PdctlError]:
    """Nodes whose own file puts them into another cell: they keep what they have, and get nothing more."""
    found = {}
    for name, room in rooms.items():
        cell = cluster.cell_of(name) if cluster is not None else ""
        if room.cell != cell:
            message = (
                f"node {name} counts itself to cell {room.cell!r}, and the topology to {cell!r}: it gets no engines"
            )
            found[name] = PdctlError(message, "write the same cells into the files of all nodes, and restart its agent")
    return found


def _lonely(wishes: Sequence[Wish], nodes: Mapping[str, str], cluster: Cluster | None) -> PdctlError | None:
    """Why engines of a cell have no counterpart in it."""
    if cluster is None or not cluster.cells:
        return None
    try:
        check_cells(wishes, nodes, {node: cluster.cell_of(node) for node in nodes.values()})
    except PdctlError as failure:
        return failure
    return None


def orders_of(values: Iterable[bytes]) -> list[Order]:
    """The orders among what the registry has."""
    found = []
    for value in values:
        try:
            found.append(msgspec.json.decode(value, type=Order))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # of another version: it is written anew
    return found
