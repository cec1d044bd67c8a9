"""Changes a running service to another plan, step by step, while clients are served.

New processes are started first. When they are ready, the proxies are notified. Then changed processes are drained and
restarted one by one, and removed ones are drained and stopped last. If a step fails, the apply stops there; processes
that were running before keep running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from pdctl.control_api import ApplyProgress, ApplyState
from pdctl.plan import Plan, ProcessSpec
from pdctl.plan.changes import Changes, diff
from pdctl.supervisor.unit.lifecycle import ENDED, Goal, Kind, LifecycleEvent, Phase
from pdctl.supervisor.unit.unit import Unit


class ApplyFailed(Exception):
    """A step failed. The message is for the user."""


class Managed(Protocol):
    """The operations on a service that an apply needs."""

    @property
    def plan(self) -> Plan: ...
    def unit(self, name: str) -> Unit | None: ...
    def open_sockets(self, specs: list[ProcessSpec]) -> None: ...
    def add(self, spec: ProcessSpec) -> Unit: ...
    def remove(self, unit: Unit) -> None: ...
    def change_role(self, name: str, role: str) -> None: ...
    async def take_on(self, plan: Plan) -> str: ...


@dataclass(slots=True)
class Progress:
    """The progress of an apply."""

    state: ApplyState
    step: str = ""
    error: str = ""

    def status(self) -> ApplyProgress:
        """As `pdctl status --json` shows it."""
        return ApplyProgress(state=self.state, step=self.step, error=self.error)


async def apply(service: Managed, wanted: Plan, say: Callable[[str], None]) -> None:
    """Apply `wanted`. Raises ApplyFailed, PdctlError. If it is cancelled, the steps done so far are kept."""
    changes = diff(service.plan, wanted)
    specs = {spec.name: spec for spec in wanted.processes}
    service.open_sockets([specs[name] for name in (*changes.added, *changes.restarted)])
    others, proxies = _split(changes.added, specs)
    for name in others:
        for needed in specs[name].depends_on:
            if needed in others:
                await _until_ready(service, needed)
        say(f"adding {name}")
        service.add(specs[name])
    for name in others:
        await _until_ready(service, name)
    for spec in service.plan.processes:
        if spec.name in changes.live and spec.name in specs and spec.role != specs[spec.name].role:
            say(f"{spec.name}: {changes.live[spec.name]}")
            service.change_role(spec.name, specs[spec.name].role)
    # From here on, requests may go to the new engines. Engines to be removed are still in the plan.
    staying = [spec for spec in service.plan.processes if spec.name in changes.removed]
    say("updating the proxies")
    _raise(await service.take_on(_with(wanted, staying, service.plan)))
    others, restarted_proxies = _split(changes.restarted, specs)
    for name in (*others, *restarted_proxies):
        say(f"restarting {name}: {changes.restarted[name]}")
        await _replace(service, specs[name])
    for name in proxies:
        say(f"adding {name}")
        service.add(specs[name])
        await _until_ready(service, name)
    await _remove(service, changes, say)
    _raise(await service.take_on(wanted))


async def _remove(service: Managed, changes: Changes, say: Callable[[str], None]) -> None:
    # The plan lists a process behind those that it needs.
    for name in reversed(changes.removed):
        unit = service.unit(name)
        if unit is None:
            continue
        say(f"removing {name}")
        unit.feed(LifecycleEvent(Kind.DRAIN, goal=Goal.STOP))
        await unit.until(ENDED)
        service.remove(unit)


async def _replace(service: Managed, spec: ProcessSpec) -> None:
    """Drain and stop the process, and start it with the new spec."""
    unit = service.unit(spec.name)
    assert unit is not None
    unit.is_replaced = spec.slots > 0
    unit.feed(LifecycleEvent(Kind.DRAIN, goal=Goal.STOP))
    await unit.until(ENDED)
    service.remove(unit)
    service.add(spec)
    await _until_ready(service, spec.name)


async def _until_ready(service: Managed, name: str) -> None:
    unit = service.unit(name)
    assert unit is not None
    await unit.until(ENDED | {Phase.READY})
    if unit.life.phase in ENDED:
        raise ApplyFailed(f"{name} {unit.life.reason or unit.life.phase.value}")


def _split(names: Iterable[str], specs: dict[str, ProcessSpec]) -> tuple[list[str], list[str]]:
    """Split names into proxies, which come last, and all others."""
    known = list(names)
    return [n for n in known if not specs[n].is_proxy], [n for n in known if specs[n].is_proxy]


def _with(plan: Plan, staying: list[ProcessSpec], before: Plan) -> Plan:
    """The wanted plan while the old one is being replaced: engines that have not been restarted have the old lease."""
    lease_s = min(plan.lease_s, before.lease_s)
    return replace(plan, processes=(*plan.processes, *staying), lease_s=lease_s)


def _raise(reason: str) -> None:
    if reason:
        raise ApplyFailed(f"not every proxy applied the new settings: {reason}")
