"""Host memory: /proc/meminfo, and the limit of this process's cgroup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_memory(proc_root: Path = Path("/proc")) -> tuple[int, int]:
    """Total and available memory in bytes."""
    found = {}
    for line in (proc_root / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found["MemTotal"], found["MemAvailable"]


def read_group_room(proc_root: Path = Path("/proc"), sysfs_root: Path = Path("/sys")) -> int | None:
    """Bytes left in the tightest cgroup of this process and its parents; None if none has a limit.

    Reclaimable cache (inactive_file) does not count as used.
    """
    rooms = [room for folder in _groups(proc_root, sysfs_root / "fs/cgroup") if (room := _room(folder)) is not None]
    return min(rooms, default=None)


def _groups(proc_root: Path, mount: Path) -> Iterator[Path]:
    """This process's cgroup and its parents: `0::PATH` of version 2, the memory controller's of version 1."""
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
        # In a container the path may be the host's, but only its root is mounted.
        yield from dict.fromkeys([*(f for f in (folder, *folder.parents) if f.is_relative_to(root)), root])


def _room(group: Path) -> int | None:
    for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (group / most).read_text().strip(), int((group / now).read_text())
            stat = (group / "memory.stat").read_text()
        except (OSError, ValueError):
            continue
        # Version 1 writes a huge number for "no limit".
        if not limit.isdecimal() or int(limit) >= 1 << 60:
            return None
        cache = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
        return max(0, int(limit) - used + cache)
    return None
