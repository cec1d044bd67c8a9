"""The verbs for a single process as lifecycle events; and draining, which needs the whole service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from pdctl.control_api import Verb
from pdctl.supervisor.unit.lifecycle import Goal, Kind, LifecycleEvent, Phase
from pdctl.supervisor.unit.unit import Unit
from pdctl.wire import EngineState

_DRAINABLE = (Phase.READY, Phase.DRAINING, Phase.DRAINED)
_LOOK_S = 0.05

Calls = Callable[[str], Awaitable[int]]
State = Callable[[str], Awaitable[EngineState | str]]


def event_of(verb: Verb, drain: bool) -> LifecycleEvent:
    """The event of a verb."""
    if drain and verb in ("stop", "restart"):
        return LifecycleEvent(Kind.DRAIN, goal=Goal.STOP if verb == "stop" else Goal.AGAIN)
    return {
        "start": LifecycleEvent(Kind.RESUME),
        "stop": LifecycleEvent(Kind.STOP),
        "restart": LifecycleEvent(Kind.RESTART),
        "drain": LifecycleEvent(Kind.DRAIN, goal=Goal.HOLD),
    }[verb]


def objection(unit: Unit, verb: Verb) -> str:
    """Why a verb is not possible now, or ""."""
    phase = unit.life.phase
    if verb == "drain" and phase not in _DRAINABLE:
        return f"{unit.name} is {phase.value}: only a ready process can be drained"
    if verb == "drain" and unit.spec.is_proxy:
        return f"{unit.name} is drained automatically when it is stopped or restarted"
    if verb == "drain" and not unit.spec.is_engine:
        return f"{unit.name} is not an engine: the proxy sends it no requests"
    return ""


async def drained(name: str, within_s: float, calls_at: Calls, state_of: State) -> bool:
    """Return True when no request runs in the engine any more; False when `within_s` has passed."""
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
