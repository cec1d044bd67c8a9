"""What is wrong with this machine for serving. One file for each area; an area turns facts into findings.

A finding says what was seen, what was expected, what it means and what to do. What could not be found out is
`unknown`, never ok.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Area(StrEnum):
    """What can be looked into."""

    RDMA = "rdma"
    GPU = "gpu"
    HOST = "host"
    NET = "net"
    RUNTIME = "runtime"
    TOPOLOGY = "topology"
    TRANSFER = "transfer"


class Severity(StrEnum):
    """Worst first."""

    CRITICAL = "critical"
    WARNING = "warning"
    UNKNOWN = "unknown"
    INFO = "info"
    OK = "ok"


ORDER = tuple(Severity)


@dataclass(frozen=True, slots=True)
class Finding:
    """`id`: the check's name, such as port.state; `subject`: what it is about, such as mlx5_0:1; `evidence`: where it
    was read; `cause`, `fix` and `reference` are empty where there is nothing to say."""

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
        """For `--json`."""
        return asdict(self)


def exit_code(findings: list[Finding]) -> int:
    """0 ok, 1 warnings, 2 critical, 3 could not tell."""
    found = {finding.severity for finding in findings}
    if Severity.CRITICAL in found:
        return 2
    if Severity.WARNING in found:
        return 1
    return 3 if Severity.UNKNOWN in found else 0
