"""Runs `apply` on the service, one at a time, and keeps its progress."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pdctl.errors import PdctlError
from pdctl.plan import Plan, ProcessSpec
from pdctl.plan.changes import with_roles
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.service.change.apply import ApplyFailed, Progress, apply
from pdctl.supervisor.service.change.roles import Roles
from pdctl.supervisor.service.files import ServiceFiles
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.unit.unit import Unit, UnitContext


class ChangeOver:
    """See apply.Managed. `progress`: of the last apply, None before the first one."""

    def __init__(
        self,
        state: ServiceState,
        fleet: Fleet,
        kv: KvWatch,
        proxies: Proxies,
        files: ServiceFiles,
        listeners: Listeners,
        context: UnitContext,
        roles: Roles,
    ) -> None:
        self.progress: Progress | None = None
        self._state = state
        self._fleet = fleet
        self._kv = kv
        self._proxies = proxies
        self._files = files
        self._listeners = listeners
        self._context = context
        self._roles = roles
        self._task: asyncio.Task[None] | None = None

    @property
    def plan(self) -> Plan:
        """The running plan."""
        return self._state.plan

    @property
    def is_under_way(self) -> bool:
        """Whether an apply is running."""
        return self._task is not None

    @property
    def step(self) -> str:
        """The current step."""
        return self.progress.step if self.progress else ""

    def begin(self, wanted: Plan) -> str:
        """Start to apply a plan. Returns the reason if it is refused, else ""."""
        if self._state.is_stopping:
            return "the service is stopping"
        if self._task is not None:
            return f"another apply is in progress: {self.step}"
        if wanted.run_dir != self.plan.run_dir:
            return f"the topology is for service {wanted.service!r}, not for {self.plan.service!r}"
        self._task = self._context.tasks.create_task(self._run(with_roles(self.plan, wanted)))
        return ""

    async def until_over(self) -> None:
        """Return when no apply is running."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def cancel(self) -> None:
        """Cancel the apply. The steps done so far are kept."""
        if self._task is not None:
            self._task.cancel()

    # -- see Managed ---------------------------------------------------------------------------------------

    def unit(self, name: str) -> Unit | None:
        """The process of that name."""
        return self._fleet.get(name)

    def add(self, spec: ProcessSpec) -> Unit:
        """Add a process; the next step starts it. Raises PdctlError if its socket cannot be bound."""
        unit = self._fleet.add(spec, self._context)
        self._state.changed.set()
        return unit

    def open_sockets(self, specs: list[ProcessSpec]) -> None:
        """Open the sockets that the specs listen on, and claim their ports. Raises PdctlError, before any process is
        changed."""
        for spec in specs:
            if spec.listen is not None:
                self._listeners.of(spec.listen)
        self._listeners.claim(specs)

    def remove(self, unit: Unit) -> None:
        """Remove a process that has ended."""
        self._fleet.remove(unit)
        self._kv.forget(unit.name)
        self._state.changed.set()

    def change_role(self, name: str, role: str) -> None:
        """Give a running engine another role."""
        self._roles.change(name, role, self.plan.supervision.drain_s)

    async def take_on(self, plan: Plan) -> str:
        """Make `plan` the running plan, without changing processes. Returns why a proxy did not apply it, or ""."""
        self._state.follow(plan)
        self._fleet.follow(plan)
        self._files.keep_plan()
        return await self._proxies.tell(plan)

    # -- parts ---------------------------------------------------------------------------------------------

    async def _run(self, wanted: Plan) -> None:
        progress, journal = Progress("running"), self._context.journal
        self.progress = progress

        def say(step: str) -> None:
            progress.step = step
            journal.say("pdctl", step, "apply")

        try:
            await apply(self, wanted, say)
            progress.state, progress.step = "done", ""
        except (ApplyFailed, PdctlError) as failure:
            progress.state, progress.error = "failed", str(failure)
            journal.say("pdctl", f"the apply failed: {failure}", "apply_failed")
        finally:
            # Even after a partial apply, the plan must match the existing processes.
            self._state.plan = replace(self.plan, processes=self._fleet.specs())
            self._listeners.claim_only(self.plan.processes)
            self._files.keep_plan()
            self._task = None
            self._state.changed.set()
