"""Main memory: /proc/meminfo, and the limit of the control group that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_memory(proc_root: Path = Path("/proc")) -> tuple[int, int]:
    """(total, available) in bytes."""
    found = {}
    for line in (proc_root / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found["MemTotal"], found["MemAvailable"]


def read_group_room(proc_root: Path = Path("/proc"), sysfs_root: Path = Path("/sys")) -> int | None:
    """Bytes that the narrowest control group above this process has left; None where none is limited.

    Cache that the kernel would give back (inactive_file) does not count as taken.
    """
    rooms = [room for folder in _groups(proc_root, sysfs_root / "fs/cgroup") if (room := _room(folder)) is not None]
    return min(rooms, default=None)


def _groups(proc_root: Path, mount: Path) -> Iterator[Path]:
    """This process's group and all above it: `0::PATH` of version 2, the memory controller's of version 1."""
    try:
        lines = (proc_root / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        folder = root / path.lstrip("/")
        # In a container the path may be the host's, of which only the root is mounted.
        yield from dict.fromkeys([*(f for f in (folder, *folder.parents) if f.is_relative_to(root)), root])


def _room(group: Path) -> int | None:
    for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (group / most).read_text().strip(), int((group / now).read_text())
            stat = (group / "memory.stat").read_text()
        except (OSError, ValueError):
            continue
        # Version 1 writes the largest number of pages for no limit.
        if not limit.isdecimal() or int(limit) >= 1 << 60:
            return None
        cache = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
        return max(0, int(limit) - used + cache)
    return None
