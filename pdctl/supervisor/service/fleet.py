"""All units of a service: which exist, and in which order they start and stop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pdctl.plan import Plan, ProcessSpec
from pdctl.supervisor.cluster.entries import DRAINING, READY, EngineEntry
from pdctl.supervisor.process.keeper import Keepers
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.rundir.adoption import Record
from pdctl.supervisor.service.kv import Member
from pdctl.supervisor.unit.lifecycle import ENDED, LIVE, Goal, Kind, LifecycleEvent, Phase
from pdctl.supervisor.unit.unit import Unit, UnitContext
from pdctl.supervisor.unit.views import record_of

_ANSWERING = frozenset({Phase.READY, Phase.DRAINING, Phase.DRAINED})
_DRAINED = frozenset({Phase.DRAINING, Phase.DRAINED})


class Fleet:
    """Units by name, in the plan's order. `stamp`: the common part of the stamps in their environments."""

    def __init__(self, stamp: str, listeners: Listeners, keepers: Keepers) -> None:
        self._stamp = stamp
        self._listeners = listeners
        self._keepers = keepers
        self._units: dict[str, Unit] = {}

    def __iter__(self) -> Iterator[Unit]:
        return iter(list(self._units.values()))

    def get(self, name: str) -> Unit | None:
        """The unit of that name."""
        return self._units.get(name)

    def add(self, spec: ProcessSpec, around: UnitContext) -> Unit:
        """Add a unit. Raises PdctlError if its socket cannot be bound."""
        unit = Unit(spec, around, f"{self._stamp}:{spec.name}")
        if spec.listen is not None:
            unit.listen_fd = self._listeners.of(spec.listen).fileno()
        unit.keeper = self._keepers.of(spec.name, spec.slots)
        self._units[spec.name] = unit
        return unit

    def remove(self, unit: Unit) -> None:
        """Remove a unit that has ended."""
        assert unit.life.phase in ENDED
        del self._units[unit.name]

    def follow(self, plan: Plan) -> None:
        """Apply the plan's order, and those of its specs that do not require a restart."""
        order = {spec.name: number for number, spec in enumerate(plan.processes)}
        self._units = dict(sorted(self._units.items(), key=lambda item: order.get(item[0], len(order))))
        for spec in plan.processes:
            unit = self._units.get(spec.name)
            if unit is not None and unit.spec.digest() == spec.digest():
                unit.spec = spec

    # -- order ---------------------------------------------------------------------------------------------

    def start_what_may(self, was_ready: bool) -> None:
        """Start pending units whose dependencies are ready. Once the service has been ready, units do not wait."""
        for unit in self:
            needed = [self._units[name] for name in unit.spec.depends_on if name in self._units]
            may = was_ready or all(other.life.phase is Phase.READY for other in needed)
            if unit.life.phase is Phase.PENDING and may:
                unit.feed(LifecycleEvent(Kind.START, time.monotonic()))

    def stop_what_may(self) -> None:
        """Stop units on which no running unit depends."""
        for unit in self:
            life = unit.life
            if life.phase in ENDED or (life.phase in (Phase.STOPPING, Phase.CLEARING) and life.goal is Goal.STOP):
                continue
            dependants = [other for other in self if unit.name in other.spec.depends_on]
            # A unit that is not running needs no wait, and must not start again.
            if life.phase not in LIVE or all(other.life.phase in ENDED for other in dependants):
                unit.feed(LifecycleEvent(Kind.STOP, time.monotonic()))

    def restart_companions(self, dead: Unit) -> list[Unit]:
        """Restart the units that have `dead` in their `restart_with`. Returns them."""
        found = [u for u in self if dead.name in u.spec.restart_with and u.life.phase in LIVE]
        for unit in found:
            unit.feed(LifecycleEvent(Kind.RESTART))
        return found

    def force(self) -> None:
        """Kill everything immediately."""
        for unit in self:
            unit.force()

    # -- members -------------------------------------------------------------------------------------------

    @property
    def phases(self) -> list[Phase]:
        """The phases of all units."""
        return [unit.life.phase for unit in self]

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and every exit report is written."""
        return all(unit.life.phase in ENDED and not unit.reports for unit in self)

    def failed(self) -> Unit | None:
        """A failed unit, or None."""
        return next((unit for unit in self if unit.life.phase is Phase.FAILED), None)

    def drained(self) -> frozenset[str]:
        """Names of the engines that get no new requests."""
        return frozenset(unit.name for unit in self if unit.spec.is_engine and unit.life.phase in _DRAINED)

    def members(self) -> list[Member]:
        """Engines that answer."""
        return [
            Member(
                unit.name,
                unit.spec.kind,
                unit.spec.role,
                unit.spec.host,
                unit.spec.ports["http"],
                unit.epoch,
                role_epoch=unit.spec.role_epoch,
                tls=unit.spec.tls,
                fetches=unit.spec.fetches,
            )
            for unit in self
            if unit.spec.is_engine and unit.life.phase in _ANSWERING and unit.alive
        ]

    def entries(self, node: str) -> list[EngineEntry]:
        """Engines and proxies that answer, as other nodes see them."""
        return [
            entry_of(unit, node) for unit in self if unit.spec.is_ours and unit.life.phase in _ANSWERING and unit.alive
        ]

    def serving(self) -> list[ProcessSpec]:
        """Proxies that answer."""
        return [unit.spec for unit in self if unit.spec.is_proxy and unit.life.phase is Phase.READY]

    def holders(self) -> set[str]:
        """The names under which running processes may hold leases."""
        return {f"{unit.name}@{unit.epoch}" for unit in self if unit.alive}

    def pids(self) -> set[int]:
        """The pids of all units and their leaders."""
        found = {unit.pid for unit in self if unit.pid is not None}
        return found | {unit.leader for unit in self if unit.leader is not None}

    def records(self) -> list[Record]:
        """The records that a later supervisor needs."""
        return [record for unit in self if (record := record_of(unit)) is not None]

    def specs(self) -> tuple[ProcessSpec, ...]:
        """The current spec of every unit."""
        return tuple(unit.spec for unit in self)


def entry_of(unit: Unit, node: str) -> EngineEntry:
    """One engine or proxy, as other nodes see it."""
    spec = unit.spec
    # A proxy with several workers, or with TLS for clients, answers its own service at another port.
    port = spec.ports.get("control") or spec.ports["http"]
    return EngineEntry(
        node=node,
        name=unit.name,
        kind=spec.kind,
        role=spec.role,
        host=spec.host,
        port=port,
        epoch=unit.epoch,
        state=DRAINING if unit.life.phase in _DRAINED else READY,
        role_epoch=spec.role_epoch,
        connector=spec.connector,
        ports={purpose: port for purpose, port in spec.ports.items() if purpose != "http"},
        inline=spec.inline,
    )
