"""What people ask of a single process, as events of its life; and draining, which needs the whole service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from pdctl.supervisor.unit.lifecycle import Goal, Kind, LifecycleEvent, Phase
from pdctl.supervisor.unit.unit import Unit
from pdctl.wire import EngineState

VERBS = ("start", "stop", "restart", "drain")
_DRAINABLE = (Phase.READY, Phase.DRAINING, Phase.DRAINED)
_LOOK_S = 0.05

Calls = Callable[[str], Awaitable[int]]
State = Callable[[str], Awaitable[EngineState | str]]


def event_of(verb: str, drain: bool) -> LifecycleEvent:
    """The event of one of VERBS."""
    if drain and verb in ("stop", "restart"):
        return LifecycleEvent(Kind.DRAIN, goal=Goal.STOP if verb == "stop" else Goal.AGAIN)
    return {
        "start": LifecycleEvent(Kind.RESUME),
        "stop": LifecycleEvent(Kind.STOP),
        "restart": LifecycleEvent(Kind.RESTART),
        "drain": LifecycleEvent(Kind.DRAIN, goal=Goal.HOLD),
    }[verb]


def objection(unit: Unit, verb: str) -> str:
    """Why a verb makes no sense now, or ""."""
    phase = unit.life.phase
    if verb == "drain" and phase not in _DRAINABLE:
        return f"{unit.name} is {phase.value}: only what is ready can be drained"
    if verb == "drain" and unit.spec.kind == "proxy":
        return f"{unit.name} drains by itself when it is stopped or restarted"
    return ""


async def drained(name: str, within_s: float, calls_at: Calls, state_of: State) -> bool:
    """Return when nothing runs in an engine any more; False when its time is over."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        calls, state = await asyncio.gather(calls_at(name), state_of(name))
        busy = calls
        if isinstance(state, EngineState):
            busy += state.running + state.waiting + len(state.leases)
        if not busy:
            return True
        await asyncio.sleep(_LOOK_S)
    return False
