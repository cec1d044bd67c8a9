"""RDMA devices, as sysfs tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """`pci`: its address, or "" for one that is no PCI function; `is_active`: a port of it is up."""

    name: str
    pci: str
    is_active: bool


def read_rdma(sysfs_root: Path = Path("/sys")) -> tuple[RdmaDevice, ...]:
    """All devices, in order of name; none on a machine without RDMA."""
    folder = sysfs_root / "class" / "infiniband"
    if not folder.is_dir():
        return ()
    return tuple(RdmaDevice(device.name, _address(device), _is_up(device)) for device in sorted(folder.iterdir()))


def active_devices(sysfs_root: Path = Path("/sys")) -> list[str]:
    """Names of the devices with a port that is ACTIVE, in order."""
    return [device.name for device in read_rdma(sysfs_root) if device.is_active]


def _address(device: Path) -> str:
    try:
        name = (device / "device").resolve(strict=True).name
    except OSError:
        return ""
    return name if name.count(":") == 2 else ""


def _is_up(device: Path) -> bool:
    for state in device.glob("ports/*/state"):
        try:
            if "ACTIVE" in state.read_text():
                return True
        except OSError:  # a port that vanished while we looked is not up
            continue
    return False
