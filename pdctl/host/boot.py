"""Ids of the current boot, and of process starts during it."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path


def host_id(proc_root: Path = Path("/proc")) -> str:
    """An id that is equal for processes that see each other's /proc entries and so can map each other's memory."""
    return f"{boot_id(proc_root)}/{(proc_root / 'self/ns/pid').readlink()}"


def new_epoch(proc_root: Path = Path("/proc"), node: str = "") -> str:
    """The epoch of a start: the boot id and a counter that only grows during the boot; of a node of a cluster, with its
    name before that, so that whoever holds a lease says on which node it is."""
    counted = f"{boot_id(proc_root).replace('-', '')[:8]}-{time.clock_gettime_ns(time.CLOCK_BOOTTIME):x}"
    return f"{node}~{counted}" if node else counted


@cache
def boot_id(proc_root: Path = Path("/proc")) -> str:
    """The kernel's id of this boot."""
    return (proc_root / "sys/kernel/random/boot_id").read_text().strip()
