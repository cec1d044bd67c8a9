"""Changes the roles of engines while they run, without a restart and without losing a request.

An engine takes work of its new role at once, and ends what it has of the one before: in between it is a hybrid. Answers
that take longer than the drain go on at other engines (see pdctl.proxy.request.migration).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

from pdctl.plan import Plan, ProcessSpec
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.service.files import ServiceFiles
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.unit import Unit
from pdctl.wire import EngineState

_LOOK_S = 0.05
# Streams that cannot move within this time stay until they end, seconds.
_MOVE_S = 60.0


class Roles:
    """The changes of roles."""

    def __init__(
        self,
        state: ServiceState,
        fleet: Fleet,
        kv: KvWatch,
        proxies: Proxies,
        files: ServiceFiles,
        journal: Journal,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._state = state
        self._fleet = fleet
        self._kv = kv
        self._proxies = proxies
        self._files = files
        self._journal = journal
        self._tasks = tasks
        self._running: dict[str, asyncio.Task[None]] = {}

    def objection(self, name: str, role: str) -> str:
        """Why an engine cannot get this role now, or ""."""
        unit = self._fleet.get(name)
        if unit is None or not unit.spec.is_engine:
            engines = ", ".join(unit.name for unit in self._fleet if unit.spec.is_engine)
            return f"no engine {name!r}; known: {engines}"
        if not unit.spec.switches:
            return f"engines of kind {unit.spec.kind!r} cannot change their role while they run"
        if unit.life.phase is not Phase.READY:
            return f"{name} is {unit.life.phase.value}: only a ready engine can change its role"
        elsewhere = [address.role for address in self._proxies.remote()]
        return lacking(self._state.plan, name, role, elsewhere)

    def change(self, name: str, role: str, drain_s: float) -> None:
        """Begin to change a role. A change to the current role does nothing, and one to the role before goes back."""
        unit = self._fleet.get(name)
        assert unit is not None
        before = unit.spec.role
        if before == role:
            return
        unit.spec = with_role(unit.spec, role)
        plan = self._state.plan
        specs = tuple(unit.spec if spec.name == name else spec for spec in plan.processes)
        self._state.follow(replace(plan, processes=specs))
        self._files.keep_plan()
        self._state.unsaved.set()
        self._state.changed.set()
        if (running := self._running.pop(name, None)) is not None:
            running.cancel()
        self._running[name] = self._tasks.create_task(self._carry_out(unit, before, role, drain_s))

    async def _carry_out(self, unit: Unit, before: str, role: str, drain_s: float) -> None:
        began = time.monotonic()
        unit.leaving_role = {"prefill": "decode", "decode": "prefill"}.get(role, "")
        try:
            # The engine first: from then on it refuses requests that proxies send by its old role.
            await self._kv.tell_role(unit.name)
            await self._tell()
            self._say(unit, f"{before} to {role}", "role_changed", role=role, before=before, s=_since(began))
            await self._kv.link(unit.name)
            await self._finish(unit, role, drain_s)
            self._say(unit, f"is {role} alone", "role_done", role=role, before=before, s=_since(began))
        finally:
            unit.leaving_role = ""
            self._proxies.moving.discard(unit.name)
            self._state.changed.set()
        await self._tell()

    async def _finish(self, unit: Unit, role: str, drain_s: float) -> None:
        """Return when nothing is left of the old role."""
        if await self._ended(unit, role, drain_s if role == "prefill" else None):
            return
        self._proxies.moving.add(unit.name)
        await self._tell()
        if not await self._ended(unit, role, _MOVE_S):
            self._say(unit, "some answers cannot move and end here", "role_drain_over")
            await self._ended(unit, role, None)

    async def _ended(self, unit: Unit, role: str, within_s: float | None) -> bool:
        """Whether the old work has ended within this time, or the engine is gone."""
        deadline = None if within_s is None else time.monotonic() + within_s
        while unit.life.phase is Phase.READY:
            state = await self._kv.state_of(unit.name)
            if isinstance(state, EngineState) and not left(state, role):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def _tell(self) -> None:
        if reason := await self._proxies.tell(self._state.plan):
            self._journal.say("pdctl", f"not every proxy was updated: {reason}")

    def _say(self, unit: Unit, message: str, event: str, **detail: object) -> None:
        self._journal.say(unit.name, message, event, **detail)


def with_role(spec: ProcessSpec, role: str) -> ProcessSpec:
    """The engine with another role. What the topology wants of it is remembered."""
    planned = spec.planned_role or spec.role
    return replace(spec, role=role, planned_role="" if role == planned else planned, role_epoch=spec.role_epoch + 1)


def left(state: EngineState, role: str) -> int:
    """How many requests an engine of this role still has that others should have: prompts for peers, or answers."""
    return {"decode": state.prefills, "prefill": state.answers}.get(role, 0)


def lacking(plan: Plan, name: str, role: str, elsewhere: Iterable[str] = ()) -> str:
    """Why a service cannot do without this engine's old role, or "". `elsewhere`: roles of engines of other nodes."""
    roles = [spec.role for spec in plan.processes if spec.is_engine and spec.name != name]
    roles += [*elsewhere, *(attached.role for attached in plan.attached), role]
    for kind, verb in (("prefill", "prefills"), ("decode", "decodes")):
        if not {kind, "hybrid"} & set(roles):
            return f"no other engine {verb}: make {name} hybrid, or another one {kind} first"
    return ""


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
