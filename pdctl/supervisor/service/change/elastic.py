"""Lets roles follow the load: asks the controller at each look, and changes a role or says what it would do."""

from __future__ import annotations

import asyncio
import time

from pdctl.elastic import Decision, EngineView, Pressure, RoleName, Rules
from pdctl.elastic.controller import Memory, decide
from pdctl.plan import Plan
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.service.change.roles import Roles
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.unit import Unit
from pdctl.wire import EngineState

# How often the setting is looked at while it is off, seconds.
_OFF_S = 2.0
_ROLES: dict[str, RoleName] = {"prefill": "prefill", "decode": "decode", "hybrid": "hybrid"}


class ElasticRoles:
    """One controller for the engines of a service. Every decision is an event; a refusal only when it is a new one."""

    def __init__(self, state: ServiceState, fleet: Fleet, kv: KvWatch, roles: Roles, journal: Journal) -> None:
        self._state = state
        self._fleet = fleet
        self._kv = kv
        self._roles = roles
        self._journal = journal
        self._memory = Memory()
        self._said = ""
        self._mode = "off"

    async def run_forever(self) -> None:
        """Look at the engines from time to time."""
        while True:
            elastic = self._state.plan.elastic
            await asyncio.sleep(_OFF_S if elastic.mode == "off" else elastic.interval_s)
            if elastic.mode != self._mode:
                # What was only advised is not done.
                self._mode, self._memory, self._said = elastic.mode, Memory(), ""
            if elastic.mode == "off" or self._state.is_stopping:
                continue
            self.look(await self._views(), elastic.mode == "act")

    def look(self, views: list[EngineView], acts: bool) -> None:
        """Decide on these engines, and do or say it."""
        self._memory, found = decide(self._memory, views, rules_of(self._state.plan), time.monotonic())
        if not found.engine:
            self._refuse(found)
            return
        if (reason := self._roles.objection(found.engine, found.role)) and acts:
            self._refuse(found._replace(why=reason))
            return
        doing = "changes" if acts else "would change"
        self._say(found.engine, f"{doing} to {found.role}: {found.why}", found, role=found.role, acts=acts)
        self._said = ""
        if acts:
            self._roles.change(found.engine, found.role, self._state.plan.supervision.drain_s)

    async def _views(self) -> list[EngineView]:
        states = await self._kv.states()
        return [
            view
            for unit in self._fleet
            if isinstance(state := states.get(unit.name), EngineState)
            if (view := _view(unit, state)) is not None
        ]

    def _refuse(self, found: Decision) -> None:
        # The words before a number say what kind of refusal it is.
        kind = found.why.rstrip("0123456789. s").split(" at ")[0].split(" for ")[0]
        if kind != self._said:
            self._said = kind
            self._say("pdctl", found.why, found, freezes=found.freezes)

    def _say(self, process: str, message: str, found: Decision, **detail: object) -> None:
        self._journal.say(process, message, "elastic", now=_told(found.now), then=_told(found.then), **detail)


def rules_of(plan: Plan) -> Rules:
    """The controller's rules."""
    elastic = plan.elastic
    return Rules(plan.ttft_ms / 1000, plan.tpot_ms / 1000, elastic.min_prefill, elastic.min_decode, elastic.cooldown_s)


def _view(unit: Unit, state: EngineState) -> EngineView | None:
    """None for an engine that cannot change its role, or does not predict its steps."""
    if not unit.spec.switches or state.work is None:
        return None
    used = 1 - state.blocks_free / state.blocks_total if state.blocks_total else 0.0
    settled = unit.life.phase is Phase.READY and not unit.leaving_role
    seats = max(1, state.max_num_seqs)
    return EngineView(unit.name, _ROLES[unit.spec.role], state.work, seats, used, settled, unit.spec.inline)


def _told(pressure: Pressure) -> dict[str, float]:
    return {name: round(value, 3) for name, value in pressure._asdict().items()}
