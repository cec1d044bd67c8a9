"""Brings the service to its desired state: starts and stops units, and reacts to each change of a unit."""

from __future__ import annotations

import asyncio

from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch
from pdctl.supervisor.service.links.keeper import LinkKeeper
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.surface.notify import Notifier
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.unit import Unit
from pdctl.supervisor.unit.verbs import drained


class Reconciler:
    """Makes one step after each change. The units call the methods that take a unit (see UnitContext)."""

    def __init__(
        self,
        state: ServiceState,
        fleet: Fleet,
        kv: KvWatch,
        links: LinkKeeper,
        proxies: Proxies,
        journal: Journal,
        notifier: Notifier,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._state = state
        self._fleet = fleet
        self._kv = kv
        self._links = links
        self._proxies = proxies
        self._journal = journal
        self._notifier = notifier
        self._tasks = tasks
        self._told: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Make steps until the service is down."""
        while True:
            self._step()
            if self._state.is_stopping and self._fleet.is_over:
                return
            await self._state.changed.wait()
            self._state.changed.clear()

    # -- called by units -----------------------------------------------------------------------------------

    def unit_changed(self, unit: Unit) -> None:
        """A unit's state has changed. If the set of draining engines changed, notify the proxies at once."""
        self._state.changed.set()
        self._state.unsaved.set()
        draining = self._fleet.drained()
        if draining != self._told and not self._state.is_stopping:
            self._told = draining
            self._proxies.draining = set(draining)
            self._tasks.create_task(self._tell())

    def unit_ready(self, unit: Unit) -> None:
        """Link a new engine to its peers. The service is ready only when all link attempts have ended."""
        if unit.spec.is_proxy:
            # The file may have changed after the proxy read it.
            self._tasks.create_task(self._tell())
        elif unit.spec.is_engine:
            self._state.linking += 1
            self._tasks.create_task(self._link(unit))

    def unit_died(self, unit: Unit) -> asyncio.Task[None]:
        """A process has ended: release its leases now, without waiting for its restart."""
        if unit.life.phase is not Phase.STOPPING:
            for other in self._fleet.restart_companions(unit):
                self._journal.say(other.name, f"restarted with {unit.name}", "restarted_with")
        if self._links.died(unit.name) and not self._state.is_stopping:
            self._tasks.create_task(self._tell())
        return self._tasks.create_task(self._reclaim(unit))

    async def drain(self, unit: Unit) -> None:
        """Return when no request runs in an engine, or `drain_s` has passed. A proxy drains on SIGTERM, so not here;
        other processes have no requests."""
        if not unit.spec.is_engine:
            return
        plan = self._state.plan
        await self._proxies.tell(plan)
        drain_s = plan.supervision.drain_s
        if await drained(unit.name, drain_s, self._proxies.calls_at, self._kv.state_of):
            return
        self._journal.say(unit.name, f"still busy after {drain_s:g} s: its requests continue elsewhere", "drain_over")

    # -- parts ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Start all units that may start now or, when stopping, stop all units that may stop now."""
        state, plan = self._state, self._state.plan
        is_ready = state.word(self._fleet.phases) == "ready"
        state.was_ready |= is_ready
        # A node of a cluster starts without processes.
        if is_ready and not state.is_announced and self._fleet.phases:
            state.is_announced = True
            self._journal.say("pdctl", f"service {plan.service!r} is ready at {plan.proxy_url}", "service_ready")
            self._notifier.say("READY=1", f"STATUS=ready at {plan.proxy_url}")
        self._check_start()
        if state.is_stopping:
            self._fleet.stop_what_may()
        else:
            self._fleet.start_what_may(state.was_ready)

    def _check_start(self) -> None:
        """If the start fails before the service was ever ready, stop the whole service."""
        if self._state.was_ready or self._state.is_stopping:
            return
        failed = self._fleet.failed()
        reason = self._kv.refused() or (f"{failed.name} {failed.life.reason}" if failed else "")
        if reason:
            self._state.failure = reason
            self._state.is_stopping = True

    async def _reclaim(self, unit: Unit) -> None:
        # Only engines and proxies hold leases.
        if unit.spec.is_engine or unit.spec.is_proxy:
            await self._kv.reclaim(unit.name, f"{unit.name}@{unit.epoch}")

    async def _tell(self) -> None:
        if reason := await self._proxies.tell(self._state.plan):
            self._journal.say("pdctl", f"not every proxy was updated: {reason}")

    async def _link(self, unit: Unit) -> None:
        await self._kv.tell_role(unit.name)
        await self._kv.link(unit.name)
        await self._links.link(unit.name)
        self._state.linking -= 1
        self._state.changed.set()
