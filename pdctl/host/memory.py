"""Main memory, from /proc/meminfo."""

from __future__ import annotations

from pathlib import Path


def read_memory(proc_root: Path = Path("/proc")) -> tuple[int, int]:
    """(total, available) in bytes."""
    found = {}
    for line in (proc_root / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found["MemTotal"], found["MemAvailable"]
