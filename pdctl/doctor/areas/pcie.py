"""Checks of PCIe: link widths of bridges, access control (ACS), IOMMU, access of network cards to GPU memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.devices.pci import chain
from pdctl.host.devices.sysfs import Reader

# PCI Express base specification: the extended capability, its control register, and the bits that redirect peer traffic
# to the root complex (P2P request redirect, P2P completion redirect).
_ACS, _ACS_CONTROL, _REDIRECT = 0x000D, 6, 0x4 | 0x8
_EXTENDED = 0x100
# Limit of capabilities to read: a corrupt list may have a loop.
_MOST_CAPABILITIES = 96
_DMABUF_KERNEL = (5, 12)


@dataclass(frozen=True, slots=True)
class PcieFacts:
    """Facts for PCIe checks. `functions`: subject to PCI address; `direct`: RDMA should read GPU memory (GPUDirect)."""

    functions: dict[str, str]
    direct: bool = False
    env: dict[str, str] = field(default_factory=dict)
    uses_mooncake: bool = False
    sysfs_root: Path = Path("/sys")
    proc_root: Path = Path("/proc")
    reader: Reader = field(default_factory=Reader)

    def width(self, address: str, which: str) -> int:
        """The `current` or `max` number of lanes; 0 if unknown."""
        found = self.reader.read(self.sysfs_root / "bus/pci/devices" / address / f"{which}_link_width").integer()
        return found or 0


def check(facts: PcieFacts) -> list[Finding]:
    """Run all checks; none if there are no functions to check."""
    return [finding for one in CHECKS for finding in one(facts)] if facts.functions else []


def path_width(facts: PcieFacts) -> Iterator[Finding]:
    """Bridges above a card with a link that is narrower than both ends support."""
    told: set[str] = set()
    for subject, address in facts.functions.items():
        path = [part for part in chain(address, facts.sysfs_root) if part.count(":") == 2]
        for position, bridge in enumerate(path[:-1]):
            most = [facts.width(part, "max") for part in path[max(0, position - 1) : position + 2]]
            now = facts.width(bridge, "current")
            # The link's other end may be either neighbour; a width below all of them is a fault in any case.
            if bridge not in told and 0 < now < min((lanes for lanes in most if lanes), default=0):
                told.add(bridge)
                yield Finding(
                    "pcie.path", Severity.CRITICAL, subject, f"{now} lanes at bridge {bridge} above it",
                    f"{min(lanes for lanes in most if lanes)}", f"/sys/bus/pci/devices/{bridge}/current_link_width",
                    "a problem with the slot, riser, cable or BIOS setting",
                    "reseat it; lspci -vv shows LnkSta and LnkCap of the bridge",
                )  # fmt: skip


def access_control(facts: PcieFacts) -> Iterator[Finding]:
    """ACS on bridges: it redirects traffic between a GPU and a network card to the root complex (NCCL guide)."""
    if not facts.direct:
        return
    bridges = {
        part for a in facts.functions.values() for part in chain(a, facts.sysfs_root)[:-1] if part.count(":") == 2
    }
    on, hidden = [], False
    for bridge in sorted(bridges):
        control = _acs_control(facts.sysfs_root / "bus/pci/devices" / bridge / "config")
        hidden = hidden or control is None
        if control and control & _REDIRECT:
            on.append(bridge)
    if on:
        virtual = is_virtual_machine(facts.proc_root)
        yield Finding(
            "pcie.acs", Severity.INFO if virtual else Severity.WARNING, "pcie",
            f"ACS redirects peer traffic at {', '.join(on)}",
            "must stay on in a virtual machine" if virtual else "off on bare metal", "PCI configuration space",
            "GPUDirect goes through the root complex",
            "" if virtual else f"setpci -s {on[0]} ECAP_ACS+6.w=0, after each boot",
            "NCCL troubleshooting; NVIDIA AI Enterprise",
        )  # fmt: skip
    elif hidden:
        yield Finding(
            "pcie.acs", Severity.UNKNOWN, "pcie", "only root can read the bridges' configuration", "",
            "/sys/bus/pci/devices/*/config", "", "run as root: sudo pdctl doctor",
        )  # fmt: skip


def iommu(facts: PcieFacts) -> Iterator[Finding]:
    """IOMMU translation: it slows down traffic between cards; pass-through (`identity`) does not."""
    if not facts.direct or is_virtual_machine(facts.proc_root):
        return
    kinds = set()
    for address in facts.functions.values():
        group = facts.sysfs_root / "bus/pci/devices" / address / "iommu_group/type"
        kinds.add(facts.reader.read(group).text.strip())
    translated = sorted(kind for kind in kinds if kind.startswith("DMA"))
    if translated:
        yield Finding(
            "host.iommu", Severity.WARNING, "pcie", f"the IOMMU translates ({', '.join(translated)})", "identity",
            "iommu_group/type", "GPUDirect is slow or fails", "boot with iommu=pt", "NCCL troubleshooting",
        )  # fmt: skip


def direct_access(facts: PcieFacts) -> Iterator[Finding]:
    """Access of network cards to GPU memory: through nvidia-peermem, or dma-buf with the open kernel modules."""
    if not facts.direct:
        return
    peermem = any((facts.sysfs_root / "module" / name).is_dir() for name in ("nvidia_peermem", "nv_peer_mem"))
    dmabuf = _has_dmabuf(facts.proc_root)
    asks_for_peermem = facts.uses_mooncake and facts.env.get("WITH_NVIDIA_PEERMEM", "1") not in ("0", "false", "off")
    if peermem or (dmabuf and not asks_for_peermem):
        yield Finding("gdr.access", Severity.OK, "gpu memory", "nvidia_peermem" if peermem else "dma-buf")
    elif dmabuf:
        yield Finding(
            "gdr.access", Severity.INFO, "gpu memory", "Mooncake needs nvidia_peermem, which is not loaded",
            "the module, or dma-buf", "/sys/module",
            "network cards cannot read GPU memory; the builtin engine works without this",
            "modprobe nvidia_peermem, or: export WITH_NVIDIA_PEERMEM=0", "Mooncake, environ.cpp",
        )  # fmt: skip
    else:
        yield Finding(
            "gdr.access", Severity.INFO, "gpu memory", "neither nvidia_peermem nor dma-buf",
            "one of them", "/sys/module, /proc/driver/nvidia/version",
            "network cards cannot read GPU memory; the builtin engine works without this",
            "modprobe nvidia_peermem, or use kernel 5.12 or newer with NVIDIA's open modules",
        )  # fmt: skip


def is_virtual_machine(proc_root: Path = Path("/proc")) -> bool:
    """Whether this is a virtual machine (the hypervisor bit of CPUID, from /proc/cpuinfo)."""
    try:
        return " hypervisor" in (proc_root / "cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def _has_dmabuf(proc_root: Path) -> bool:
    try:
        version = (proc_root / "driver/nvidia/version").read_text()
        kernel = (proc_root / "sys/kernel/osrelease").read_text()
        major, minor = kernel.split(".")[:2]
        return "Open Kernel Module" in version and (int(major), int(minor)) >= _DMABUF_KERNEL
    except (OSError, ValueError):
        return False


def _acs_control(config: Path) -> int | None:
    """The ACS control word; 0 for a bridge without ACS, None if only root can read it."""
    try:
        data = config.read_bytes()
    except OSError:
        return 0
    if len(data) <= _EXTENDED:
        return None if os.geteuid() else 0
    at = _EXTENDED
    for _ in range(_MOST_CAPABILITIES):
        if at < _EXTENDED or at + 8 > len(data):
            break
        (header,) = struct.unpack_from("<I", data, at)
        if header & 0xFFFF == _ACS:
            return int(struct.unpack_from("<H", data, at + _ACS_CONTROL)[0])
        at = header >> 20
    return 0


CHECKS: tuple[Callable[[PcieFacts], Iterator[Finding]], ...] = (path_width, access_control, iommu, direct_access)
