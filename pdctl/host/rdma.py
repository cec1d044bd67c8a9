"""RDMA devices, as sysfs tells of them."""

from __future__ import annotations

from pathlib import Path


def active_devices(sysfs_root: Path = Path("/sys")) -> list[str]:
    """Names of the devices with a port that is ACTIVE, in order; none on a machine without RDMA."""
    folder = sysfs_root / "class" / "infiniband"
    if not folder.is_dir():
        return []
    return sorted(device.name for device in folder.iterdir() if _is_up(device))


def _is_up(device: Path) -> bool:
    for state in device.glob("ports/*/state"):
        try:
            if "ACTIVE" in state.read_text():
                return True
        except OSError:  # a port that vanished while we looked is not up
            continue
    return False
