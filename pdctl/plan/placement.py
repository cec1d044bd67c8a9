"""Which node of a cluster each engine runs on. Pure: the same wishes and nodes give the same places.

Engines stay where they are while their node is there and has the GPUs. The others go, largest first, to the node that
has the fewest engines of their group, then of their role, then the most free GPUs, then the fewest engines: each node
gets prefill and decode engines, whose KV then stays on it, and a lost node takes few engines of one kind along.

KV never leaves a cell: each cell that is used gets engines of both roles, in proportion to its size. A service with few
engines of a role uses few cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import combinations, islice

from pdctl.errors import PdctlError

# Sets of nodes that are tried as lost, times nodes. Of many nodes there are too many sets: those with the most engines
# come first.
_MOST_LOOKS = 50_000
# What decides between nodes: engines of the group and of the role there, free GPUs, all engines; and the node.
_Rank = tuple[int, int, int, int, str]


@dataclass(frozen=True, slots=True)
class Wish:
    """One engine to be placed. `gpus`: how many it needs on one node, 0 for CPUs; `shares`: on GPUs that others use, if
    none is free; `memory`: of the node, in bytes; `nodes`: where it may run, empty for anywhere."""

    name: str
    group: str
    role: str
    gpus: int = 0
    nodes: tuple[str, ...] = ()
    shares: bool = False
    memory: int = 0

    def may_run_on(self, node: str) -> bool:
        """Whether the topology allows this node."""
        return not self.nodes or node in self.nodes


@dataclass(frozen=True, slots=True)
class Room:
    """What a node has for engines. `memory` in bytes; `cell`: the part of the cluster that it is in."""

    gpus: int
    memory: int = 1 << 62
    cell: str = ""


@dataclass(slots=True)
class Places:
    """Engine name to node, and why the others have none."""

    nodes: dict[str, str] = field(default_factory=dict)
    failures: dict[str, PdctlError] = field(default_factory=dict)


def assign(
    wishes: Sequence[Wish], rooms: Mapping[str, Room], before: Mapping[str, str], spare: int = 0
) -> dict[str, str]:
    """Engine name to node. `before`: where engines are now, by name.

    `spare`: so many nodes may fail, and the rest still has room. Raises PdctlError if there is no room.
    """
    places = fit(wishes, rooms, before)
    if places.failures:
        raise next(iter(places.failures.values()))
    check_cells(wishes, places.nodes, {node: room.cell for node, room in rooms.items()})
    check_spare(wishes, rooms, places.nodes, spare)
    return {wish.name: places.nodes[wish.name] for wish in wishes}


def fit(wishes: Sequence[Wish], rooms: Mapping[str, Room], before: Mapping[str, str]) -> Places:
    """As `assign`, but engines without room are left out, and the others have their places."""
    nodes, places = _Nodes(rooms, _cells_to_use(wishes, rooms, before)), Places()
    for wish in wishes:
        node = before.get(wish.name, "")
        if node in rooms and wish.may_run_on(node) and nodes.has_room(node, wish):
            nodes.put(node, wish)
            places.nodes[wish.name] = node
    _place([wish for wish in wishes if wish.name not in places.nodes], nodes, places)
    return places


def _place(wishes: Iterable[Wish], nodes: _Nodes, places: Places) -> None:
    """Give engines the best nodes that are left, largest first."""
    for wish in sorted(wishes, key=lambda wish: (wish.shares, -wish.gpus, len(wish.nodes) or nodes.count + 1)):
        found = nodes.best(wish)
        if found is None:
            places.failures[wish.name] = nodes.no_room(wish)
        else:
            nodes.put(found, wish)
            places.nodes[wish.name] = found


def check_spare(wishes: Sequence[Wish], rooms: Mapping[str, Room], places: Mapping[str, str], spare: int) -> None:
    """Raise PdctlError if some `spare` nodes cannot be done without. `places`: of all these engines."""
    if not spare:
        return
    nodes = _Nodes(rooms, {rooms[node].cell for node in places.values()})
    held: dict[str, list[Wish]] = {node: [] for node in rooms}
    for wish in wishes:
        nodes.put(places[wish.name], wish)
        held[places[wish.name]].append(wish)
    fullest = sorted(rooms, key=lambda node: -len(held[node]))
    sets = combinations(fullest, min(spare, len(fullest)))
    for lost in islice(sets, max(1, _MOST_LOOKS // max(1, len(rooms)))):
        moved = Places()
        _place([wish for node in lost for wish in held[node]], nodes.without(lost), moved)
        if moved.failures:
            hint = "lower replicas, add a node, or lower spare_nodes of [cluster]"
            failure = next(iter(moved.failures.values()))
            raise PdctlError(f"without {' and '.join(sorted(lost))}, {failure.message}", hint)


def check_cells(wishes: Sequence[Wish], places: Mapping[str, str], cells: Mapping[str, str]) -> None:
    """Raise PdctlError if a cell has prefill engines only, or decode engines only, of a service that has both. `cells`:
    by node."""
    if not {"prefill", "decode"} <= {wish.role for wish in wishes}:
        return
    roles: dict[str, set[str]] = {}
    for wish in wishes:
        if wish.name in places:
            roles.setdefault(cells[places[wish.name]], set()).add(wish.role)
    for cell, found in roles.items():
        if found in ({"prefill"}, {"decode"}):
            [has] = found
            lacks = "decode" if has == "prefill" else "prefill"
            raise PdctlError(
                f"cell {cell!r} would have {has} engines, but none for {lacks}",
                f"raise replicas of {lacks} engines, or use fewer and larger cells",
            )


def _cells_to_use(wishes: Sequence[Wish], rooms: Mapping[str, Room], before: Mapping[str, str]) -> set[str]:
    """The cells that get engines: those that have some, then the largest; not more than there are engines of a role."""
    sizes = Counter(room.cell for room in rooms.values())
    for room in rooms.values():
        sizes[room.cell] += room.gpus
    roles = Counter(wish.role for wish in wishes)
    few = min((count for role, count in roles.items() if role != "hybrid"), default=len(sizes))
    used = Counter(rooms[node].cell for wish in wishes if (node := before.get(wish.name, "")) in rooms)
    return set(sorted(sizes, key=lambda cell: (-used[cell], -sizes[cell], cell))[: max(1, few)])


class _Nodes:
    """What is left on each node while engines are placed. Cells that are not in `used` come last."""

    def __init__(self, rooms: Mapping[str, Room], used: Collection[str]) -> None:
        self._rooms = rooms
        self._used = used
        self._cells: dict[str, list[str]] = {}
        for node, room in rooms.items():
            self._cells.setdefault(room.cell, []).append(node)
        self._sizes = {cell: sum(1 + rooms[node].gpus for node in nodes) for cell, nodes in self._cells.items()}
        self._in_cells: Counter[tuple[str, str]] = Counter()
        self._gpus = {node: room.gpus for node, room in rooms.items()}
        self._memory = {node: room.memory for node, room in rooms.items()}
        self._groups: Counter[tuple[str, str]] = Counter()
        self._roles: Counter[tuple[str, str]] = Counter()
        self._all: Counter[str] = Counter()
        # Engines of one group and size find their nodes in one heap. Ranks in it may be old: they only grow.
        self._heaps: dict[tuple[object, ...], list[_Rank]] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._rooms)

    def without(self, lost: Collection[str]) -> _Nodes:
        """The same nodes without some of them."""
        rest = _Nodes({node: room for node, room in self._rooms.items() if node not in lost}, self._used)
        rest._gpus, rest._memory = ({n: held[n] for n in rest._rooms} for held in (self._gpus, self._memory))
        rest._groups, rest._roles, rest._all = self._groups.copy(), self._roles.copy(), self._all.copy()
        rest._in_cells = self._in_cells.copy()
        for node in lost:
            for (where, group), count in self._groups.items():
                if where == node:
                    rest._in_cells[self._rooms[node].cell, group] -= count
        return rest

    def has_room(self, node: str, wish: Wish) -> bool:
        gpus = self._rooms[node].gpus if wish.shares else self._gpus[node]
        return gpus >= wish.gpus and self._memory[node] >= wish.memory

    def put(self, node: str, wish: Wish) -> None:
        self._gpus[node] = max(0, self._gpus[node] - wish.gpus)
        self._memory[node] -= wish.memory
        self._groups[node, wish.group] += 1
        self._roles[node, wish.role] += 1
        self._all[node] += 1
        self._in_cells[self._rooms[node].cell, wish.group] += 1

    def best(self, wish: Wish) -> str | None:
        """The node for an engine; None if no node has room."""
        # In proportion to the sizes of the cells.
        cells = sorted(
            self._cells,
            key=lambda cell: (cell not in self._used, self._in_cells[cell, wish.group] / self._sizes[cell], cell),
        )
        return next(filter(None, (self._best_in(cell, wish) for cell in cells)), None)

    def _best_in(self, cell: str, wish: Wish) -> str | None:
        key = (cell, wish.group, wish.role, wish.gpus, wish.nodes, wish.shares, wish.memory)
        if key not in self._heaps:
            self._heaps[key] = [self._rank(node, wish) for node in self._cells[cell] if wish.may_run_on(node)]
            heapify(self._heaps[key])
        heap = self._heaps[key]
        while heap:
            rank, node = heap[0], heap[0][4]
            if not self.has_room(node, wish):
                heappop(heap)
            elif rank != (now := self._rank(node, wish)):
                heapreplace(heap, now)
            else:
                return node
        return None

    def no_room(self, wish: Wish) -> PdctlError:
        """Why an engine has no node."""
        allowed = [*self._allowed(wish)]
        if not allowed:
            known = _listed(self._rooms) or "none"
            wanted = ", ".join(wish.nodes) or "any node"
            return PdctlError(
                f"{wish.name} may run on {wanted}, but no such node is there (known: {known})",
                "start pdctl agent there, or change nodes of its group",
            )
        hint = "lower replicas, or add a node"
        if all(self._gpus[node] < wish.gpus for node in allowed):
            left = _listed(f"{node} {self._gpus[node]} of {self._rooms[node].gpus}" for node in allowed)
            wanted = f"{wish.gpus} free GPU{'s' * (wish.gpus != 1)}"
            return PdctlError(f"no node has {wanted} for {wish.name}; free: {left}", hint)
        left = _listed(f"{node} {max(0, self._memory[node]) / 2**30:.0f} GiB" for node in allowed)
        wanted = f"{wish.memory / 2**30:g} GiB of free memory"
        return PdctlError(
            f"no node has {wanted} for {wish.name}; free: {left}", "lower kv_cache_gb or replicas, or add a node"
        )

    def _allowed(self, wish: Wish) -> Iterable[str]:
        return (node for node in self._rooms if wish.may_run_on(node))

    def _rank(self, node: str, wish: Wish) -> _Rank:
        counts = self._groups[node, wish.group], self._roles[node, wish.role]
        return (*counts, -self._gpus[node], self._all[node], node)


def _listed(names: Iterable[str]) -> str:
    """Up to eight of the names."""
    found = [*names]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
