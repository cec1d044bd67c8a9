"""The kernel log: published messages, and this machine's own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pdctl.doctor import Severity
from pdctl.doctor.areas.kernel import RECENT_S, check
from pdctl.host.kernel_log import KernelLog, Message, parse_record, read_kernel_log

LINES = {
    "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.": (
        "gpu.xid", "critical", "GPU at 0000:3b:00"),
    "NVRM: Xid (PCI:0000:1a:00): 31, pid=41, name=python3, Ch 00000008, intr 00000000. MMU Fault": (
        "gpu.xid", "warning", "GPU at 0000:1a:00"),
    "mlx5_core 0000:5d:00.0: CREATE_MKEY(0x200) op_mod(0x0) failed, status no resources(0xf), syndrome (0x0)": (
        "nic.mkey", "critical", "mlx5_core 0000:5d:00.0"),
    "mlx5_core 0000:5d:00.0: wait_func:1180: ACCESS_REG(0x805) timeout. Will cause a leak of a command resource": (
        "drv.log", "critical", "mlx5_core 0000:5d:00.0"),
    "mlx5_core 0000:5d:00.0: poll_health:795:(pid 0): device's health compromised - reached miss count": (
        "drv.log", "critical", "mlx5_core 0000:5d:00.0"),
    "mlx5_core 0000:5d:00.0: mlx5_pcie_event:301: Detected insufficient power on the PCIe slot (27W).": (
        "drv.log", "warning", "mlx5_core 0000:5d:00.0"),
    "NETDEV WATCHDOG: eth1 (mlx5_core): transmit queue 3 timed out": ("drv.log", "warning", "kernel log"),
    "mlx5_core 0000:5d:00.0 ens1np0: Link down": ("link.log", "warning", "mlx5_core 0000:5d:00.0"),
}  # fmt: skip


@pytest.mark.parametrize("text", LINES)
def test_messages(text: str) -> None:
    id_, severity, subject = LINES[text]
    log = KernelLog("x", (Message(100.0, "systemd[1]: Started."), Message(120.0, text), Message(130.0, text)))
    [found] = check(log, now=190.0)
    assert (found.id, found.severity.value, found.subject) == (id_, severity, subject)
    assert found.observed.endswith("2 times, last 1 min ago")
    assert found.fix


def test_old_news_is_told_and_not_judged() -> None:
    log = KernelLog("x", (Message(1.0, next(iter(LINES))),))
    assert [f.severity for f in check(log, 2 + RECENT_S)] == [Severity.INFO]


def test_what_is_of_no_concern() -> None:
    calm = (Message(1.0, "mlx5_core 0000:5d:00.0: firmware version: 28.39"), Message(2.0, "usb 1-1: new"))
    log = KernelLog("x", calm)
    assert [(f.id, f.severity) for f in check(log, 3.0)] == [("kernel.log", Severity.OK)]


def test_a_log_that_may_not_be_read(tmp_path: Path) -> None:
    found = check(read_kernel_log(tmp_path / "none"), 1.0)
    assert [(f.id, f.severity) for f in found] == [("kernel.log", Severity.UNKNOWN)]
    assert "No such file" in found[0].observed


def test_texts_as_dmesg_and_journalctl_write_them(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("[ 12.500000] one\nNov 25 21:14:00 box kernel: [   13.250000] two\nthree\n")
    assert read_kernel_log(path).messages == (Message(12.5, "one"), Message(13.25, "two"), Message(None, "three"))


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "fifo"])
def test_what_is_no_log_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name if name == "fifo" else Path(name)
    if name == "fifo":
        os.mkfifo(path)
    found = read_kernel_log(path)
    assert not found.messages
    assert bool(found.unread) == (name == "fifo")


def test_records_of_the_device() -> None:
    assert parse_record(b"6,339,5140900,-;NET: Registered\n SUBSYSTEM=net\n") == Message(5.1409, "NET: Registered")
    assert parse_record(b"nonsense") is None


def test_this_machines_own() -> None:
    log = read_kernel_log()
    assert log.unread or all(message.at is not None for message in log.messages)
    assert os.geteuid() or not log.unread or "permitted" in log.unread or "No such" in log.unread


def test_texts_with_dates(tmp_path: Path) -> None:
    path = tmp_path / "log"
    now, clock = time.time(), time.clock_gettime(time.CLOCK_MONOTONIC)
    ago = time.localtime(now - 3600)
    zone = time.strftime("%z", ago)
    lines = (
        time.strftime("[%a %b %e %H:%M:%S %Y] one", ago),
        time.strftime(f"%Y-%m-%dT%H:%M:%S,123456{zone[:3]}:{zone[3:]} two", ago),
        time.strftime(f"%Y-%m-%dT%H:%M:%S{zone} box kernel: three", ago),
        time.strftime("%b %e %H:%M:%S box kernel: four", ago),
        time.strftime("%b 99 %H:%M:%S box kernel: five", ago),
    )
    path.write_text("\n".join(lines))
    found = read_kernel_log(path)
    assert [message.text for message in found.messages[:4]] == ["one", "two", "three", "four"]
    for message in found.messages[:4]:
        assert message.at is not None
        assert abs(message.at - (clock - 3600)) < 60
    assert found.messages[4].at is None
    assert abs(found.taken_at - clock) < 60


def test_a_log_of_another_boot_has_its_own_clock(tmp_path: Path) -> None:
    path = tmp_path / "log"
    xid = next(iter(LINES))
    path.write_text(f"[ 10.000000] {xid}\n[ 9999999999.0] the last\n")
    log = read_kernel_log(path)
    assert log.taken_at == 9999999999.0
    assert [f.severity for f in check(log, log.taken_at)] == [Severity.INFO]


def test_what_unused_devices_do_is_told_only() -> None:
    log = KernelLog("x", tuple(Message(100.0, text) for text in LINES))
    unused = frozenset({"0000:5d:00.0", "0000:3b:00.0"})
    weights = {(f.id, f.subject): f.severity for f in check(log, 101.0, unused)}
    assert weights["gpu.xid", "GPU at 0000:3b:00"] is Severity.INFO
    assert weights["gpu.xid", "GPU at 0000:1a:00"] is Severity.WARNING
    assert weights["nic.mkey", "mlx5_core 0000:5d:00.0"] is Severity.INFO
