"""Frees KV that requests have left at engines and nobody can name (Ability.SWEEP).

Such an engine is swept when it has much of it, or has had nothing to do for a while. A sweep frees everything, so no
request may use the engine meanwhile: it gets no new ones, and the sweep waits until every proxy says that it has none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pdctl.adapters import Ability
from pdctl.net.http_client import Unreachable
from pdctl.plan import Plan
from pdctl.proxy_wire import EngineLoad
from pdctl.supervisor.service.kv import KvWatch, Member
from pdctl.supervisor.service.proxies import Proxies

_LOOK_S = 0.5
# A sweep is due at this part of the KV that a proxy may use there, or after this time without a request, seconds.
_PART = 0.25
_IDLE_S = 5.0
# Waiting for running requests, and the sweep itself, seconds.
_QUIET_S, _SWEEP_S = 30.0, 60.0
_QUIET_LOOK_S = 0.05
_PAUSE_AFTER_FAILURE_S = 5.0


@dataclass(slots=True)
class _Swept:
    """One start of an engine. `done`: as its kind counts; `sent_before`: what proxies had sent when it was new."""

    epoch: str
    sent_before: int
    done: int = 0
    idle_since: float | None = None
    not_before: float = 0.0


@dataclass(slots=True)
class Sweeper:
    """`members` returns the engines that answer."""

    kv: KvWatch
    proxies: Proxies
    members: Callable[[], list[Member]]
    plan: Callable[[], Plan]
    say: Callable[[str, str], None]
    _swept: dict[str, _Swept] = field(default_factory=dict)

    async def run_forever(self) -> None:
        """Sweep when it is due, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for member in self.members():
                if member.role == "prefill" and Ability.SWEEP in member.control.abilities:
                    await self.look(member)

    def keep_only(self, names: set[str]) -> None:
        """Forget what is known of other engines than these."""
        self._swept = {name: swept for name, swept in self._swept.items() if name in names}

    async def look(self, member: Member) -> None:
        """Sweep one engine if that is due."""
        loads = await self._loads(member.name)
        if loads is None:
            return
        known = self._swept.get(member.name)
        if known is None or known.epoch != member.epoch:
            known = self._swept[member.name] = _Swept(member.epoch, _sent(loads) if known else 0)
        now, calls = time.monotonic(), sum(load.calls for load in loads)
        known.idle_since = None if calls else known.idle_since or now
        is_idle = known.idle_since is not None and now - known.idle_since >= _IDLE_S
        has_any = any(load.left for load in loads)
        has_much = max((load.left_part for load in loads), default=0.0) >= _PART
        if now >= known.not_before and (has_much or (has_any and is_idle)):
            await self._sweep(member, known)

    async def _sweep(self, member: Member, known: _Swept) -> None:
        """Keep requests away, wait until there is none, sweep, and let them in again."""
        name, proxies = member.name, self.proxies
        proxies.paused.add(name)
        try:
            reason = await proxies.tell(self.plan()) or await self._free(member, known)
            if reason:
                self.say(name, f"cannot free the KV that requests have left: {reason}")
                known.not_before = time.monotonic() + _PAUSE_AFTER_FAILURE_S
        finally:
            proxies.paused.discard(name)
            known.idle_since = None
        await proxies.tell(self.plan())

    async def _free(self, member: Member, known: _Swept) -> str:
        """Returns why it was not possible, or ""."""
        loads = await self._quiet(member.name)
        if loads is None:
            return f"its requests did not end within {_QUIET_S:g} s"
        sent = max(0, _sent(loads) - known.sent_before)
        try:
            known.done = await member.control.sweep(self.kv.target(member), known.done, sent, _SWEEP_S)
        except Unreachable as failure:
            return str(failure)
        self.proxies.swept[member.name] = self.proxies.swept.get(member.name, 0) + 1
        return ""

    async def _quiet(self, name: str) -> list[EngineLoad] | None:
        """What the proxies say once none of them has a request there; None if that took too long."""
        deadline = time.monotonic() + _QUIET_S
        while time.monotonic() < deadline:
            loads = await self._loads(name)
            if loads is not None and not any(load.calls for load in loads):
                return loads
            await asyncio.sleep(_QUIET_LOOK_S)
        return None

    async def _loads(self, name: str) -> list[EngineLoad] | None:
        """What every proxy says of an engine; None while one does not answer: it may have requests there."""
        wanted = sum(spec.is_proxy for spec in self.plan().processes)
        loads = await self.proxies.loads_at(name)
        return loads if len(loads) == wanted else None


def _sent(loads: list[EngineLoad]) -> int:
    return sum(load.sent for load in loads)
