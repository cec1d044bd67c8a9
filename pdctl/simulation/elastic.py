"""Roles that follow the load, in virtual time: the controller that ships looks at imagined engines.

What is left out: streams that move. Answers end where they are, as they do within the drain of a real service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pdctl.elastic import EngineView, RoleName, Rules
from pdctl.elastic.controller import Memory, decide
from pdctl.engine.schedule import moves
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

    def look(self) -> None:
        """Decide, change a role, and look again later."""
        views = [view for place in self._places.values() if (view := _view(place)) is not None]
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
        if role == "decode":
            node = place.node
            for name in moves.unbegun(node.engine.scheduler.sequences.values()):
                node.give_back(name)


def _view(place: Place) -> EngineView | None:
    node, role = place.node, _ROLES[place.engine.address.role]
    work = node.condition().work
    if work is None:
        return None
    scheduler = node.engine.scheduler
    used = 1 - scheduler.allocator.num_free / node.spec.blocks
    settled = not any(_is_old(one, role) for one in scheduler.sequences.values())
    return EngineView(node.name, role, work, node.spec.max_num_seqs, used, settled)


def _is_old(sequence: Sequence, role: RoleName) -> bool:
    """Whether a sequence is of a role that the engine does not have any more."""
    return (role == "prefill" and not sequence.hold) or (role == "decode" and sequence.hold)
