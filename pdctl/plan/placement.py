"""Which node of a cluster each engine runs on. Pure: the same wishes and nodes give the same places.

Engines stay where they are while their node is there and has the GPUs. The others go, largest first, to the node that
has the fewest engines of their group, then of their role, then the most free GPUs: each node gets prefill and decode
engines, whose KV then stays on it, and a lost node takes few engines of one kind along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pdctl.errors import PdctlError


@dataclass(frozen=True, slots=True)
class Wish:
    """One engine to be placed. `gpus`: how many it needs on one node, 0 for CPUs; `nodes`: where it may run, empty for
    anywhere."""

    name: str
    group: str
    role: str
    gpus: int = 0
    nodes: tuple[str, ...] = ()

    def may_run_on(self, node: str) -> bool:
        """Whether the topology allows this node."""
        return not self.nodes or node in self.nodes


def assign(
    wishes: Sequence[Wish], gpus: Mapping[str, int], before: Mapping[str, str], spare: int = 0
) -> dict[str, str]:
    """Engine name to node. `gpus`: how many each node has; `before`: where engines are now, by name.

    `spare`: so many nodes may fail, and the rest still has room. Raises PdctlError if there is no room.
    """
    places = _assign(wishes, gpus, before)
    if spare:
        _check_spare(wishes, gpus, places, spare)
    return {wish.name: places[wish.name] for wish in wishes}


def _assign(wishes: Sequence[Wish], gpus: Mapping[str, int], before: Mapping[str, str]) -> dict[str, str]:
    free, places = dict(gpus), {}
    groups: Counter[tuple[str, str]] = Counter()
    roles: Counter[tuple[str, str]] = Counter()

    def put(wish: Wish, node: str) -> None:
        places[wish.name] = node
        free[node] -= wish.gpus
        groups[node, wish.group] += 1
        roles[node, wish.role] += 1

    for wish in wishes:
        node = before.get(wish.name, "")
        if node in free and wish.may_run_on(node) and free[node] >= wish.gpus:
            put(wish, node)
    for wish in sorted(wishes, key=lambda wish: (-wish.gpus, len(wish.nodes) or len(gpus) + 1)):
        if wish.name in places:
            continue
        fitting = [node for node in free if wish.may_run_on(node) and free[node] >= wish.gpus]
        if not fitting:
            raise _no_room(wish, gpus, free)
        put(wish, min(fitting, key=lambda n: (groups[n, wish.group], roles[n, wish.role], -free[n], n)))
    return places


def _check_spare(wishes: Sequence[Wish], gpus: Mapping[str, int], places: Mapping[str, str], spare: int) -> None:
    """Raise PdctlError if some `spare` nodes cannot be done without."""
    for lost in combinations(gpus, min(spare, len(gpus))):
        rest = {node: count for node, count in gpus.items() if node not in lost}
        try:
            _assign(wishes, rest, places)
        except PdctlError as failure:
            hint = "lower replicas, add a node, or lower the number of nodes that may fail"
            raise PdctlError(f"without {' and '.join(lost)}, {failure.message}", hint) from failure


def _no_room(wish: Wish, gpus: Mapping[str, int], free: Mapping[str, int]) -> PdctlError:
    allowed = [node for node in gpus if wish.may_run_on(node)]
    if not allowed:
        known = ", ".join(gpus) or "none"
        return PdctlError(
            f"{wish.name} may run on {', '.join(wish.nodes) or 'any node'}, but no such node is there (known: {known})",
            "start pdctl agent there, or change nodes of its group",
        )
    left = ", ".join(f"{node} {free[node]} of {gpus[node]}" for node in allowed)
    return PdctlError(
        f"no node has {wish.gpus} free GPU{'s' * (wish.gpus != 1)} for {wish.name}; free: {left}",
        "lower replicas, or add a node",
    )
