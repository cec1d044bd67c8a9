"""A unit as others see it: as `pdctl status` shows it, and as a later supervisor takes it over."""

from __future__ import annotations

import time

from pdctl.control_api import ProcessStatus, Takeover
from pdctl.supervisor.process.keeper import Keeper
from pdctl.supervisor.rundir.adoption import Record, start_ticks
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.unit import Unit


def status_of(unit: Unit) -> ProcessStatus:
    """The process as in `pdctl status --json`, without the measurements."""
    watch = unit.watch if unit.life.phase is Phase.STARTING else None
    return ProcessStatus(
        name=unit.name,
        kind=unit.spec.kind,
        role=unit.spec.role,
        group=unit.spec.group,
        state=unit.life.phase.value,
        reason=unit.blocked or unit.life.reason,
        pid=unit.leader if unit.alive else None,
        restarts=unit.life.restarts,
        last_exit=unit.last_exit,
        device=unit.spec.device,
        cpus=unit.spec.cpus,
        gpus=unit.spec.gpus,
        rdma=unit.spec.rdma,
        ports=unit.spec.ports,
        ready_since=unit.ready_since,
        epoch=unit.epoch,
        adopted=unit.adopted,
        log=str(unit.log_path),
        planned_role=unit.spec.planned_role,
        leaving_role=unit.leaving_role,
        phase=watch.phase if watch else "",
        takeover=_takeover(unit.keeper) if unit.keeper is not None else None,
        phase_s=round(time.monotonic() - watch.since, 1) if watch and watch.phase else None,
    )


def _takeover(keeper: Keeper) -> Takeover:
    total = keeper.total
    return Takeover(
        slots=keeper.slots,
        kept=keeper.held,
        uncovered=keeper.uncovered,
        takeovers=keeper.takeovers,
        connections=total.connections,
        resumed=total.resumed,
        repeated=total.repeated,
        cut=total.cut,
        resent_bytes=total.resent,
    )


def record_of(unit: Unit) -> Record | None:
    """What a later supervisor needs to recognise the process; None if it does not run."""
    if not unit.alive or unit.pid is None:
        return None
    return Record(
        spec=unit.spec,
        pid=unit.pid,
        start_ticks=start_ticks(unit.pid),
        epoch=unit.epoch,
        starts=unit.life.starts,
        phase=unit.life.phase.value,
        record=str(unit.exit_file or ""),
        group=str(unit.tree.join.parent) if unit.tree is not None and unit.tree.join is not None else "",
        started_at=unit.started_at,
        ready_since=unit.ready_since,
        last_exit=unit.last_exit,
    )
