"""A plan's `[supervisor]` table as a policy for the units."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from pdctl.plan import Plan
from pdctl.supervisor.process.probes import Cadence
from pdctl.supervisor.unit.lifecycle import RestartPolicy


@dataclass(slots=True)
class ProcessPolicy:
    """Settings for all processes of a service; `apply` changes them while the processes run."""

    restarts: RestartPolicy
    cadence: Cadence
    stop_signals: tuple[signal.Signals, ...]
    grace_s: float
    stable_s: float
    log_bytes: int
    survives: bool


def policy_of(plan: Plan, into: ProcessPolicy | None = None) -> ProcessPolicy:
    """A new policy, or `into` updated in place: units read it each time they need it."""
    given = plan.supervision
    signals = tuple(signal.Signals[name] for name in given.stop_signals)
    found = ProcessPolicy(
        restarts=RestartPolicy(given.max_restarts, given.within_s, len(signals)),
        cadence=Cadence(given.liveness_s, given.liveness_failures, given.progress_s, given.functional_s),
        stop_signals=signals,
        grace_s=given.grace_s,
        stable_s=given.stable_s,
        log_bytes=int(given.log_mb * 2**20),
        survives=given.on_supervisor_death == "survive",
    )
    if into is None:
        return found
    for name in ProcessPolicy.__slots__:
        setattr(into, name, getattr(found, name))
    return into
