"""Findings as text: grouped by subject, worst first, each with its fix."""

from __future__ import annotations

import sys

from pdctl import console
from pdctl.doctor import ORDER, Finding, Severity

_COLOURS = {
    Severity.CRITICAL: "red", Severity.WARNING: "yellow", Severity.UNKNOWN: "magenta", Severity.INFO: "cyan",
    Severity.OK: "green",
}  # fmt: skip


def text(findings: list[Finding]) -> str:
    """One line per finding, with cause and fix indented below."""
    by_subject: dict[str, list[Finding]] = {}
    for finding in findings:
        by_subject.setdefault(finding.subject, []).append(finding)
    groups = sorted(by_subject.values(), key=lambda group: min(ORDER.index(finding.severity) for finding in group))
    width = max((len(subject) for subject in by_subject), default=0)
    lines = []
    for group in groups:
        for finding in sorted(group, key=lambda finding: ORDER.index(finding.severity)):
            lines += _lines(finding, width)
    return "\n".join(lines)


def _lines(finding: Finding, width: int) -> list[str]:
    word = console.paint(finding.severity.value.ljust(8), _COLOURS[finding.severity], sys.stdout)
    wanted = f" (expected: {finding.expected})" if finding.expected and finding.severity is not Severity.OK else ""
    lines = [f"{word}  {finding.subject.ljust(width)}  {finding.observed}{wanted}"]
    if finding.severity in (Severity.OK, Severity.INFO) and not finding.fix:
        return lines
    indent = " " * (width + 12)
    lines += [f"{indent}{label}: {said}" for label, said in (("why", finding.cause), ("fix", finding.fix)) if said]
    return lines


def summary(findings: list[Finding]) -> str:
    """The number of findings per severity."""
    counts = {severity: sum(finding.severity is severity for finding in findings) for severity in ORDER}
    return ", ".join(f"{count} {severity.value}" for severity, count in counts.items() if count)
