"""Checks of the kernel log: Xid errors of GPUs, errors of RDMA drivers, exhausted memory keys.

Sources: Azure NHC's list of fatal Xids, NVIDIA's catalogue for Xids that programs cause, and for mlx5 messages
NVSentinel's list and Mooncake's troubleshooting guide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdctl.doctor import Finding, Severity
from pdctl.host.kernel_log import KernelLog, Message

# Azure NHC considers the last two hours.
RECENT_S = 2 * 3600.0
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+)")
_FATAL_XIDS = frozenset({48, 56, 57, 58, 62, 63, 64, 65, 68, 69, 73, 74, 79, 80, 81, 92, 94, 95, 119, 120})
_PROGRAMS_XIDS = frozenset({13, 31, 43, 45})
_XID_FIXES = {
    48: "nvidia-smi --gpu-reset; replace the card if it comes back",
    63: "nvidia-smi --gpu-reset: a row remap is pending",
    64: "replace the card: a row remap failed",
    74: "nvidia-smi nvlink --status; reseat the NVLink bridge or the board",
    79: "reboot; reseat the card: it fell off the bus",
    119: "nvidia-smi --gpu-reset, or reboot: its firmware does not answer",
    120: "nvidia-smi --gpu-reset, or reboot: its firmware does not answer",
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """The meaning of a kernel message."""

    id: str
    pattern: re.Pattern[str]
    severity: Severity
    cause: str
    fix: str


def _pattern(id_: str, text: str, severity: Severity, cause: str, fix: str) -> Pattern:
    return Pattern(id_, re.compile(text, re.I), severity, cause, fix)


PATTERNS = (
    _pattern("nic.mkey", r"CREATE_MKEY.*no resources", Severity.CRITICAL,
             "memory keys ran out: processes killed with SIGKILL leaked theirs on the card",
             "reload the driver or reboot; stop engines with SIGTERM and a grace period"),
    _pattern("drv.log", r"mlx5\S*.*(timeout\. Will cause a leak of a command resource|health compromised|"
             r"unrecoverable|miss count)", Severity.CRITICAL, "the card's firmware does not answer",
             "mlxfwreset -d DEVICE reset, or reboot; replace the card if it comes back"),
    _pattern("drv.log", r"(mlx5|infiniband|bnxt_re|efa)\S*.*soft lockup|soft lockup.*mlx5", Severity.CRITICAL,
             "a CPU was stuck in the driver", "reboot; update driver and firmware"),
    _pattern("drv.log", r"NETDEV WATCHDOG", Severity.WARNING, "a network queue stalled",
             "ethtool -S NETDEV; update the driver"),
    _pattern("drv.log", r"mlx5\S*.*(Detected insufficient power|High Temperature|Cable unplugged)", Severity.WARNING,
             "power, heat or a cable problem", "check the slot's power, the cooling and the cable"),
    _pattern("link.log", r"mlx5\S*.*(Link down|Lost carrier)|infiniband.*link down", Severity.WARNING,
             "a link went down", "reseat or replace the cable and the transceiver; check the switch port"),
)  # fmt: skip


def check(log: KernelLog, now: float, unused: frozenset[str] = frozenset()) -> list[Finding]:
    """Run all checks. `now`: time on the clock of the messages; `unused`: PCI addresses of devices to ignore."""
    if log.unread:
        return [
            Finding(
                "kernel.log", Severity.UNKNOWN, "kernel log", f"cannot be read: {log.unread}", "read access",
                log.source,
                "Xid errors and errors of RDMA drivers cannot be detected",
                "run as root, or save the log with dmesg > kernel.txt and use --kmsg kernel.txt",
            )
        ]  # fmt: skip
    found = [_weighed(finding, unused) for finding in (*_xids(log, now), *_patterns(log, now))]
    if not found:
        found.append(Finding("kernel.log", Severity.OK, "kernel log", f"{len(log.messages)} messages, none of concern"))
    return found


def _weighed(finding: Finding, unused: frozenset[str]) -> Finding:
    """Lower findings about unused devices to info. Xids omit the PCI function: 0000:3b:00."""
    about = finding.subject.lower()
    if any(address in about or about.endswith(address.rpartition(".")[0]) for address in unused):
        return replace(finding, severity=Severity.INFO)
    return finding


def _xids(log: KernelLog, now: float) -> Iterator[Finding]:
    observed: dict[tuple[str, int], list[Message]] = {}
    for message in log.messages:
        if match := _XID.search(message.text):
            observed.setdefault((match[1], int(match[2])), []).append(message)
    for (address, number), messages in observed.items():
        is_fatal = number in _FATAL_XIDS
        cause = "the card or its link failed" if is_fatal else "uncommon: see NVIDIA's Xid catalogue"
        if number in _PROGRAMS_XIDS:
            cause = "usually a program error, such as an invalid memory access"
        yield Finding(
            "gpu.xid", _aged(Severity.CRITICAL if is_fatal else Severity.WARNING, messages[-1], now),
            f"GPU at {address}", f"Xid {number}{_times(messages, now)}", "none", log.source, cause,
            _XID_FIXES.get(number,
            "nvidia-smi --gpu-reset, or reboot" if is_fatal else "pdctl why NAME, if an engine died"),
            "NVIDIA Xid catalogue; Azure NHC",
        )  # fmt: skip


def _patterns(log: KernelLog, now: float) -> Iterator[Finding]:
    observed: dict[tuple[Pattern, str], list[Message]] = {}
    for message in log.messages:
        for pattern in PATTERNS:
            if pattern.pattern.search(message.text):
                observed.setdefault((pattern, _subject(message.text)), []).append(message)
                break
    for (pattern, subject), messages in observed.items():
        yield Finding(
            pattern.id, _aged(pattern.severity, messages[-1], now), subject,
            f"{messages[-1].text[:160]}{_times(messages, now)}", "none", log.source, pattern.cause, pattern.fix,
        )  # fmt: skip


def _subject(text: str) -> str:
    """The first device in the message, such as `mlx5_core 0000:1a:00.0`."""
    found = re.search(r"\b(?:mlx5_core|bnxt_re|efa|infiniband)\b[: ]+(\S+?):?(?:\s|$)", text)
    return found[0].strip().rstrip(":") if found else "kernel log"


def _aged(severity: Severity, last: Message, now: float) -> Severity:
    """Lower the severity of old messages to info."""
    return Severity.INFO if last.at is not None and now - last.at > RECENT_S else severity


def _times(messages: list[Message], now: float) -> str:
    times = f", {len(messages)} times" if len(messages) > 1 else ""
    at = messages[-1].at
    return times + (f", last {max(0.0, now - at) / 60:.0f} min ago" if at is not None else "")
