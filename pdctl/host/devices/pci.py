"""Distances of PCI devices to each other and to CPUs, from sysfs.

The classes are those of `nvidia-smi topo -m`: PIX, at most one bridge between; PXB, several bridges but no host bridge;
PHB, the host bridge; NODE, between host bridges of one NUMA node; SYS, between NUMA nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# Nearest first.
CLASSES = ("PIX", "PXB", "PHB", "NODE", "SYS")


@dataclass(frozen=True, slots=True)
class Layout:
    """NUMA nodes by PCI address, CPUs by NUMA node, and distance classes by (GPU, RDMA device) pair."""

    nodes: dict[str, int] = field(default_factory=dict, hash=False)
    cpus: dict[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    classes: dict[tuple[str, str], str] = field(default_factory=dict, hash=False)


def path_class(a: str, b: str, sysfs_root: Path = Path("/sys")) -> str:
    """The distance class of two PCI addresses (such as 0000:17:00.0); "?" if sysfs does not have it."""
    one, other = chain(a, sysfs_root), chain(b, sysfs_root)
    if not one or not other:
        return "?"
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    if shared == 0:
        nodes = {numa_node(address, sysfs_root) for address in (a, b)}
        # Unknown NUMA node (-1): assume the farthest class.
        return "NODE" if len(nodes) == 1 and -1 not in nodes else "SYS"
    if shared == 1:
        return "PHB"
    # Below the last common bridge there is at most a switch port and the device on each side.
    return "PIX" if max(len(one), len(other)) - shared <= 2 else "PXB"


def numa_node(address: str, sysfs_root: Path = Path("/sys")) -> int:
    """The NUMA node of a PCI address; -1 if unknown."""
    try:
        return int((sysfs_root / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def node_cpus(sysfs_root: Path = Path("/sys")) -> dict[int, tuple[int, ...]]:
    """CPUs by NUMA node."""
    found = {}
    for folder in sorted((sysfs_root / "devices/system/node").glob("node[0-9]*")):
        try:
            found[int(folder.name.removeprefix("node"))] = _ranges((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
    return found


def read_layout(gpus: list[str], devices: dict[str, str], sysfs_root: Path = Path("/sys")) -> Layout:
    """The layout of GPUs (addresses) and RDMA devices (name to address)."""
    addresses = [address for address in (*gpus, *devices.values()) if address]
    return Layout(
        nodes={address: numa_node(address, sysfs_root) for address in addresses},
        cpus=node_cpus(sysfs_root),
        classes={
            (gpu, name): path_class(gpu, address, sysfs_root)
            for gpu in gpus
            if gpu
            for name, address in devices.items()
            if address
        },
    )


def chain(address: str, sysfs_root: Path = Path("/sys")) -> tuple[str, ...]:
    """The path from the root complex (pci0000:00) down to the device; empty if sysfs does not have it."""
    try:
        parts = (sysfs_root / "bus/pci/devices" / address).resolve(strict=True).parts
    except OSError:
        return ()
    start = next((n for n, part in enumerate(parts) if part.startswith("pci") and ":" in part), None)
    return parts[start:] if start is not None else ()


def _ranges(text: str) -> tuple[int, ...]:
    """Parse the kernel's cpulist format: 0-3,8."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
