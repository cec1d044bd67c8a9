"""Everything that is shown, at one moment. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pdctl.commands.top.rates import Rates
from pdctl.control_api import Event, MeasuredProcess, MeasuredStatus, ServiceStatus

_UNMEASURED: dict[str, None] = dict.fromkeys(
    ("rss_bytes", "cpu_percent", "gpu_memory_bytes", "running", "waiting", "kv_used", "leases", "tokens_per_s")
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the trends are made of: one each second. `kv_used`: of the engine that uses most, 0 to 1."""

    rates: Rates | None
    running: int
    waiting: int
    kv_used: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`trouble`: why the supervisor does not answer, else empty; then `status` is the last one. `events`: newest first.
    `samples`: oldest first."""

    status: MeasuredStatus
    trouble: str = ""
    is_running: bool = True
    events: tuple[Event, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def rates(self) -> Rates | None:
        """The newest rates; None if the proxy did not answer."""
        return self.samples[-1].rates if self.samples else None


def merged(now: ServiceStatus, measured: MeasuredStatus | None) -> MeasuredStatus:
    """The states of `now` with the last measurements. Measurements take longer, because engines are called: a process
    that has ended since, or was started again, has none."""
    known = {process.name: process for process in measured.processes} if measured is not None else {}
    processes = []
    for process in now.processes:
        fields = msgspec.structs.asdict(process)
        before = known.get(process.name)
        if before is not None and before.epoch == process.epoch and process.pid is not None:
            processes.append(msgspec.structs.replace(before, **fields))
        else:
            processes.append(MeasuredProcess(**(fields | _UNMEASURED)))
    answers = {engine.name: engine.answers for engine in measured.attached} if measured is not None else {}
    attached = tuple(
        msgspec.structs.replace(engine, answers=answers.get(engine.name, engine.answers)) for engine in now.attached
    )
    whole = msgspec.structs.asdict(now) | {"processes": tuple(processes), "attached": attached}
    return MeasuredStatus(**whole)


def sample_of(status: MeasuredStatus, rates: Rates | None) -> Sample:
    """What the trends need of a status."""
    used = [process.kv_used for process in status.processes if process.kv_used is not None]
    return Sample(
        rates,
        sum(process.running or 0 for process in status.processes),
        sum(process.waiting or 0 for process in status.processes),
        max(used, default=None),
    )
