"""Roles that follow the load, in virtual time: the controller that ships looks at imagined engines.

What is left out: streams that move. Answers end where they are, as they do within the drain of a real service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pdctl.elastic import EngineView, RoleName, Rules
from pdctl.elastic.controller import Memory, decide
from pdctl.engine.schedule.peers import moves
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.virtual import VirtualTime
from pdctl.proxy.engines.fleet import Fleet
from pdctl.simulation.requests.attempts import Place

_ROLES: dict[str, RoleName] = {"prefill": "prefill", "decode": "decode", "hybrid": "hybrid"}


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A change that was made. `at`: seconds since the simulation began."""

    at: float
    engine: str
    role: str
    why: str


class ElasticRoles:
    """One controller. `goes_on`: whether there is still load. Prompts that an engine gives back are tried elsewhere by
    whoever called."""

    def __init__(
        self,
        time: VirtualTime,
        fleet: Fleet,
        places: dict[str, Place],
        rules: Rules,
        interval_s: float,
        goes_on: Callable[[], bool],
    ) -> None:
        self.changes: list[RoleChange] = []
        self._time = time
        self._fleet = fleet
        self._places = places
        self._rules = rules
        self._interval_s = interval_s
        self._goes_on = goes_on
        self._memory = Memory()
        self._leaving: dict[str, set[str]] = {}  # by engine: its sequences from before its last change

    def look(self) -> None:
        """Decide, change a role, and look again later."""
        views = [view for place in self._places.values() if (view := self._view(place)) is not None]
        self._memory, found = decide(self._memory, views, self._rules, self._time())
        if found.engine:
            self._change(self._places[found.engine], found.role)
            self.changes.append(RoleChange(self._time(), found.engine, found.role, found.why))
        if self._goes_on():
            self._time.after(self._interval_s, self.look)

    def _change(self, place: Place, role: RoleName) -> None:
        address = place.engine.address
        epoch = address.role_epoch + 1
        place.engine.follow(msgspec.structs.replace(address, role=role, role_epoch=epoch))
        self._fleet.roles_changed()
        self._leaving[place.node.name] = {
            name for name, one in place.node.engine.scheduler.sequences.items() if _is_old(one, role)
        }
        if role == "decode":
            node = place.node
            for name in moves.unbegun(node.engine.scheduler.sequences.values()):
                node.give_back(name)

    def _view(self, place: Place) -> EngineView | None:
        node = place.node
        work = node.condition().work
        if work is None:
            return None
        scheduler = node.engine.scheduler
        used = 1 - scheduler.allocator.num_free / node.spec.blocks
        left = self._leaving.get(node.name, set()) & scheduler.sequences.keys()
        seats, role = node.spec.max_num_seqs, _ROLES[place.engine.address.role]
        return EngineView(node.name, role, work, seats, used, not left, node.spec.inline_prefill)


def _is_old(sequence: Sequence, role: RoleName) -> bool:
    """Whether a sequence is not of this role. An answer of one token is never held for another engine."""
    return (role == "prefill" and not sequence.hold) or (role == "decode" and sequence.hold)
