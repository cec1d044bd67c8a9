"""Checks of the kernel's log: GPUs' Xid errors, what RDMA drivers complain of, memory keys that ran out.

Xid classes: Azure NHC's list of fatal ones, and NVIDIA's catalogue for those that a program causes. mlx5 messages: the
NVSentinel list and Mooncake's troubleshooting guide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdctl.doctor import Finding, Severity
from pdctl.host.kernel_log import KernelLog, Message

# Azure NHC looks back two hours.
RECENT_S = 2 * 3600.0
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+)")
_FATAL_XIDS = frozenset({48, 56, 57, 58, 62, 63, 64, 65, 68, 69, 73, 74, 79, 80, 81, 92, 94, 95, 119, 120})
_PROGRAMS_XIDS = frozenset({13, 31, 43, 45})
_XID_FIXES = {
    48: "nvidia-smi --gpu-reset; replace the card if it comes back",
    63: "nvidia-smi --gpu-reset: a row remap waits for it",
    64: "replace the card: a row remap failed",
    74: "nvidia-smi nvlink --status; reseat the NVLink bridge or the board",
    79: "reboot; reseat the card: it fell off the bus",
    119: "nvidia-smi --gpu-reset, or reboot: its firmware does not answer",
    120: "nvidia-smi --gpu-reset, or reboot: its firmware does not answer",
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a message means."""

    id: str
    pattern: re.Pattern[str]
    severity: Severity
    cause: str
    fix: str


def _pattern(id_: str, text: str, severity: Severity, cause: str, fix: str) -> Pattern:
    return Pattern(id_, re.compile(text, re.I), severity, cause, fix)


PATTERNS = (
    _pattern("nic.mkey", r"CREATE_MKEY.*no resources", Severity.CRITICAL,
             "memory keys ran out: processes that were killed with SIGKILL left theirs in the card",
             "reload the driver or reboot; stop engines with SIGTERM and a grace period"),
    _pattern("drv.log", r"mlx5\S*.*(timeout\. Will cause a leak of a command resource|health compromised|"
             r"unrecoverable|miss count)", Severity.CRITICAL, "the card's firmware does not answer",
             "mlxfwreset -d DEVICE reset, or reboot; replace the card if it comes back"),
    _pattern("drv.log", r"(mlx5|infiniband|bnxt_re|efa)\S*.*soft lockup|soft lockup.*mlx5", Severity.CRITICAL,
             "a processor was stuck in the driver", "reboot; update driver and firmware"),
    _pattern("drv.log", r"NETDEV WATCHDOG", Severity.WARNING, "a network queue stood still",
             "ethtool -S NETDEV; update the driver"),
    _pattern("drv.log", r"mlx5\S*.*(Detected insufficient power|High Temperature|Cable unplugged)", Severity.WARNING,
             "power, heat or a cable", "check the slot's power, cooling, the cable"),
    _pattern("link.log", r"mlx5\S*.*(Link down|Lost carrier)|infiniband.*link down", Severity.WARNING,
             "a link went down", "reseat or replace cable and transceiver; look at the switch port"),
)  # fmt: skip


def check(log: KernelLog, now: float, unused: frozenset[str] = frozenset()) -> list[Finding]:
    """All checks; `now`: on the clock of the messages; `unused`: PCI addresses of devices that do not matter."""
    if log.unread:
        return [
            Finding(
                "kernel.log", Severity.UNKNOWN, "kernel log", f"it cannot be read: {log.unread}", "read access",
                log.source,
                "Xid errors and what RDMA drivers complain of are not seen",
                "run as root, or: dmesg > kernel.txt, and --kmsg kernel.txt",
            )
        ]  # fmt: skip
    found = [_weighed(finding, unused) for finding in (*_xids(log, now), *_patterns(log, now))]
    if not found:
        found.append(Finding("kernel.log", Severity.OK, "kernel log", f"{len(log.messages)} messages, none of concern"))
    return found


def _weighed(finding: Finding, unused: frozenset[str]) -> Finding:
    """What a device does that is not used is told, not judged. Xids leave out the function: 0000:3b:00."""
    about = finding.subject.lower()
    if any(address in about or about.endswith(address.rpartition(".")[0]) for address in unused):
        return replace(finding, severity=Severity.INFO)
    return finding


def _xids(log: KernelLog, now: float) -> Iterator[Finding]:
    seen: dict[tuple[str, int], list[Message]] = {}
    for message in log.messages:
        if match := _XID.search(message.text):
            seen.setdefault((match[1], int(match[2])), []).append(message)
    for (address, number), messages in seen.items():
        is_fatal = number in _FATAL_XIDS
        cause = "the card or its link failed" if is_fatal else "seldom seen: look it up in NVIDIA's Xid catalogue"
        if number in _PROGRAMS_XIDS:
            cause = "mostly a program's own fault, such as a bad access"
        yield Finding(
            "gpu.xid", _aged(Severity.CRITICAL if is_fatal else Severity.WARNING, messages[-1], now),
            f"GPU at {address}", f"Xid {number}{_times(messages, now)}", "none", log.source, cause,
            _XID_FIXES.get(number,
            "nvidia-smi --gpu-reset, or reboot" if is_fatal else "pdctl why NAME, if an engine died"),
            "NVIDIA Xid catalogue; Azure NHC",
        )  # fmt: skip


def _patterns(log: KernelLog, now: float) -> Iterator[Finding]:
    seen: dict[tuple[Pattern, str], list[Message]] = {}
    for message in log.messages:
        for pattern in PATTERNS:
            if pattern.pattern.search(message.text):
                seen.setdefault((pattern, _subject(message.text)), []).append(message)
                break
    for (pattern, subject), messages in seen.items():
        yield Finding(
            pattern.id, _aged(pattern.severity, messages[-1], now), subject,
            f"{messages[-1].text[:160]}{_times(messages, now)}", "none", log.source, pattern.cause, pattern.fix,
        )  # fmt: skip


def _subject(text: str) -> str:
    """The device that a driver names first, such as `mlx5_core 0000:1a:00.0`."""
    found = re.search(r"\b(?:mlx5_core|bnxt_re|efa|infiniband)\b[: ]+(\S+?):?(?:\s|$)", text)
    return found[0].strip().rstrip(":") if found else "kernel log"


def _aged(severity: Severity, last: Message, now: float) -> Severity:
    """Old news is told, not judged."""
    return Severity.INFO if last.at is not None and now - last.at > RECENT_S else severity


def _times(messages: list[Message], now: float) -> str:
    times = f", {len(messages)} times" if len(messages) > 1 else ""
    at = messages[-1].at
    return times + (f", last {max(0.0, now - at) / 60:.0f} min ago" if at is not None else "")
