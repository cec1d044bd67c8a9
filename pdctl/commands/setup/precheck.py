"""The doctor checks that `pdctl up` runs before it starts anything: the cheap ones, for its own topology only."""

from __future__ import annotations

import sys
from pathlib import Path

from pdctl import console
from pdctl.commands.common import topology_file
from pdctl.errors import PdctlError

# Critical findings that make a start certain to fail. Others are only printed: without RDMA the transfer falls back to
# TCP and reports it; a GPU error may be over; memory in use may be freed.
_IN_VAIN = frozenset(
    {
        "topology.context",
        "topology.pairs",
        "model.weights",
        "gpu.none",
        "gpu.driver",
        "gpu.memory",
        "gpu.mig",
        "gpu.mode",
    }
)


def refuse_what_cannot_work(file: Path | None, force: bool) -> None:
    """Raise PdctlError on critical findings; with `force` only print them. The built-in default is not checked."""
    from pdctl.doctor import Area, Severity
    from pdctl.doctor.inspection import Inspection, Where
    from pdctl.topology.spec import Device

    path = topology_file(file)
    if path is None:
        return
    inspection = Inspection(Where(path, remembers=False))
    areas = [Area.TOPOLOGY, Area.NET, Area.HOST, Area.RUNTIME]
    if inspection.wants_rdma:
        areas.append(Area.RDMA)
    if any(group.device is Device.CUDA for group in inspection.started):
        areas.append(Area.GPU)
    try:
        found = inspection.findings(tuple(areas))
    except (OSError, ValueError, ArithmeticError, LookupError) as failure:
        # A failure of the doctor itself is no reason to refuse a service.
        console.note(f"the doctor could not finish its checks: {type(failure).__name__}: {failure}")
        return
    critical = [finding for finding in found if finding.severity is Severity.CRITICAL]
    vain = [finding for finding in critical if finding.id in _IN_VAIN]
    for finding in critical:
        cause = f": {finding.cause}" if finding.cause else ""
        message = f"{finding.subject}: {finding.observed} (expected: {finding.expected}){cause}"
        if force or finding not in vain:
            console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {message}")
        else:
            console.error(message, finding.fix)
    if vain and not force:
        count = "1 critical finding" if len(vain) == 1 else f"{len(vain)} critical findings"
        hint = "see all findings with: pdctl doctor    start anyway with: pdctl up --force"
        raise PdctlError(f"{count}, nothing was started", hint)
