"""Find what is wrong with this machine for serving. One file per area; an area turns facts into findings.

A finding says what was observed, what was expected, what it means and how to fix it. A check that could not be made is
`unknown`, never `ok`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Area(StrEnum):
    """The areas of checks."""

    RDMA = "rdma"
    GPU = "gpu"
    HOST = "host"
    NET = "net"
    RUNTIME = "runtime"
    TOPOLOGY = "topology"
    CLUSTER = "cluster"
    TRANSFER = "transfer"


class Severity(StrEnum):
    """Severities, worst first."""

    CRITICAL = "critical"
    WARNING = "warning"
    UNKNOWN = "unknown"
    INFO = "info"
    OK = "ok"


ORDER = tuple(Severity)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `id`: the check's name, such as port.state; `subject`: what it is about, such as mlx5_0:1;
    `evidence`: where it was read. `cause`, `fix` and `reference` may be empty."""

    id: str
    severity: Severity
    subject: str
    observed: str
    expected: str = ""
    evidence: str = ""
    cause: str = ""
    fix: str = ""
    reference: str = ""

    def to_dict(self) -> dict[str, object]:
        """The finding for `--json`."""
        return asdict(self)


def exit_code(findings: list[Finding]) -> int:
    """0 ok, 1 warning, 2 critical, 3 unknown."""
    found = {finding.severity for finding in findings}
    if Severity.CRITICAL in found:
        return 2
    if Severity.WARNING in found:
        return 1
    return 3 if Severity.UNKNOWN in found else 0
