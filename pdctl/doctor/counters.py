"""RDMA port counters between two samples: how fast errors grow, not their lifetime totals.

Thresholds are NVSentinel's unless noted otherwise. Symbol errors: IBTA's bit error rate of 1e-12, which is 120 per hour
on a 4X link. Packets out of sequence: pdctl's own threshold.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.devices.rdma import RdmaTree
from pdctl.host.devices.sysfs import Reader

_HOUR = 3600.0
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample. `at`: seconds of the boot clock; `ports`: counters by port, then by name."""

    boot: str
    at: float
    ports: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A growth of more than `least` in total and more than `per_s` per second has this `severity`."""

    id: str
    names: tuple[str, ...]
    severity: Severity
    per_s: float
    cause: str
    fix: str
    least: int = 0


_CABLE = "clean, reseat or replace the cable and the transceiver"
RULES = (
    Rule("link.flap", ("link_downed",), Severity.CRITICAL, 0, "the link went down", _CABLE),
    Rule("link.flap", ("carrier_changes",), Severity.WARNING, 0, "the netdev lost and regained its carrier", _CABLE, 2),
    Rule("err.symbol", ("symbol_error",), Severity.CRITICAL, 120 / _HOUR, "bit errors on the wire", _CABLE, 9),
    Rule("err.recovery", ("link_error_recovery",), Severity.WARNING, 5 / 60, "the link recovers repeatedly",
    _CABLE),
    Rule("err.integrity", ("local_link_integrity_errors", "excessive_buffer_overrun_errors"), Severity.CRITICAL, 0,
         "packets were lost on the link", f"{_CABLE}; check flow control"),
    Rule("err.rcv", ("port_rcv_errors",), Severity.WARNING, 10, "corrupt packets arrive", _CABLE),
    Rule("err.discards", ("port_xmit_discards",), Severity.WARNING, 100, "packets could not be sent and were dropped",
         "congestion, or a peer is down: check the switch"),
    Rule("tx.retry", ("req_transport_retries_exceeded", "req_rnr_retries_exceeded"), Severity.CRITICAL, 0,
         "connections were abandoned", "a peer died or cannot be reached: check pdctl status, then the switch"),
    Rule("tx.retry", ("local_ack_timeout_err",), Severity.WARNING, 1, "acknowledgements are late",
    "check the path to the peer"),
    Rule("tx.retry", ("rnr_nak_retry_err",), Severity.WARNING, 0, "peers were not ready to receive",
         "check whether peers are overloaded"),
    Rule("roce.slow_restart", ("roce_slow_restart",), Severity.WARNING, 10, "senders restart slowly after packet loss",
         "check priority flow control and ECN: mlnx_qos, the switch"),
    Rule("roce.congestion", ("np_cnp_sent", "rp_cnp_handled"), Severity.INFO, 0,
         "ECN is active: the network is congested",
    ""),
    Rule("pcie.aer", ("aer_fatal", "aer_nonfatal"), Severity.CRITICAL, 0, "errors on the PCIe link",
         "reseat the card; check riser and slot: dmesg | grep -i aer"),
    Rule("pcie.aer", ("aer_correctable",), Severity.WARNING, 10 / 60, "corrected errors on the PCIe link",
         "reseat the card; check riser and slot"),
)  # fmt: skip
_SEQUENCE = ("out_of_sequence", "packet_seq_err", "implied_nak_seq_err", "duplicate_request")


def sample(tree: RdmaTree, boot: str, at: float, sysfs_root: Path, reader: Reader) -> Sample:
    """The counters in a snapshot of the devices."""
    ports = {}
    for device in tree.devices:
        shared = _aer(sysfs_root / "class/infiniband" / device.name / "device", reader)
        for netdev in device.netdevs:
            changes = reader.read(sysfs_root / "class/net" / netdev / "carrier_changes").integer()
            shared |= {} if changes is None else {"carrier_changes": changes}
        for port in device.ports:
            hw = {name: count for name, count in port.hw_counters.items() if name != "lifespan"}
            ports[port.subject] = {**shared, **hw, **port.counters}
    return Sample(boot, at, ports)


def _aer(function: Path, reader: Reader) -> dict[str, int]:
    """Totals of PCIe errors, from the last line of each file: `TOTAL_ERR_FATAL 0`."""
    found = {}
    for kind in ("fatal", "nonfatal", "correctable"):
        words = reader.read(function / f"aer_dev_{kind}").text.split()
        if words and words[-1].isdecimal():
            found[f"aer_{kind}"] = int(words[-1])
    return found


def compare(before: Sample, after: Sample) -> list[Finding]:
    """Findings for counters that grew between the samples; none for samples of different boots."""
    seconds = after.at - before.at
    if before.boot != after.boot or seconds <= 0:
        return []
    return [
        finding
        for subject, counts in after.ports.items()
        if subject in before.ports
        for finding in _port(subject, before.ports[subject], counts, seconds)
    ]


def _port(subject: str, before: dict[str, int], after: dict[str, int], seconds: float) -> Iterator[Finding]:
    grown = {name: count - before[name] for name, count in after.items() if name in before}
    lower = sorted(name for name, by in grown.items() if by < 0)
    if lower:
        yield Finding(
            "err.reset", Severity.INFO, subject, f"{', '.join(lower[:3])} went down", "", "counters",
            "they were reset, or the driver was reloaded",
        )  # fmt: skip
    for rule in RULES:
        for name in rule.names:
            by = grown.get(name, 0)
            if by > rule.least and by / seconds > rule.per_s:
                yield Finding(
                    rule.id, rule.severity, subject, f"{name} +{by} in {_span(seconds)}", _allowed(rule),
                    f"counters/{name}", rule.cause, rule.fix, "NVSentinel",
                )  # fmt: skip
    yield from _sequence(subject, grown, seconds)


def _sequence(subject: str, grown: dict[str, int], seconds: float) -> Iterator[Finding]:
    """Packets out of sequence as a fraction of all. Some are normal in a multipath network."""
    all_packets = grown.get("rx_write_requests", 0) + grown.get("port_rcv_packets", 0)
    wrong = sum(max(0, grown.get(name, 0)) for name in _SEQUENCE)
    part = wrong / all_packets if all_packets > 0 else 0.0
    if part > 1e-6:
        yield Finding(
            "tx.oos", Severity.CRITICAL if part > 1e-4 else Severity.WARNING, subject,
            f"{wrong} of {all_packets} packets out of sequence in {_span(seconds)}", "1 in a million",
            "hw_counters/out_of_sequence and others", "packet loss, or a multipath network",
            "check flow control, cables and adaptive routing on the switch",
        )  # fmt: skip


def traffic(before: Sample, after: Sample) -> dict[str, tuple[float, float]]:
    """GB/s received and sent per port. The kernel counts words of four bytes."""
    seconds = after.at - before.at
    found = {}
    for subject, counts in after.ports.items():
        was = before.ports.get(subject, {})
        moved = [
            max(0, counts.get(name, 0) - was.get(name, counts.get(name, 0))) * _WORD_BYTES / seconds / 1e9
            for name in ("port_rcv_data", "port_xmit_data")
        ]
        found[subject] = (moved[0], moved[1])
    return found


class Kept:
    """Stores the last sample of each sysfs root, for the next run to compare with."""

    def __init__(self, folder: Path, sysfs_root: Path) -> None:
        self._path = folder / f"counters-{zlib.crc32(str(sysfs_root.absolute()).encode()):08x}.json"

    def last(self) -> Sample | None:
        """The stored sample; None if it is missing or unreadable."""
        try:
            found = json.loads(self._path.read_text())
            return Sample(str(found["boot"]), float(found["at"]), dict(found["ports"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, found: Sample) -> None:
        """Store a sample. Errors are ignored: an unwritable folder is not what the doctor checks."""
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_text(json.dumps({"boot": found.boot, "at": found.at, "ports": found.ports}))
            new.replace(self._path)
        except OSError:
            return


def _allowed(rule: Rule) -> str:
    if not rule.per_s:
        return f"at most {rule.least}"
    return f"{rule.per_s:g}/s" if rule.per_s >= 1 else f"{rule.per_s * 60:g}/min"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.0f} h"
