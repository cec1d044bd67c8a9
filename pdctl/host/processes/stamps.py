"""Processes by a stamp (NAME=value) in their environment: children keep it across double forks and new sessions."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def stamped(stamp: str, proc_root: Path = Path("/proc")) -> list[int]:
    """Pids of living processes with `stamp` (NAME=value) in their environment; one that ends in a colon is a prefix."""
    wanted = stamp.encode()
    found = []
    for name in os.listdir(proc_root):  # noqa: PTH208 - hundreds of Path objects would cost more than the reading
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"{proc_root}/{name}/environ", "rb") as file:  # noqa: PTH123
                environment = file.read()
                if wanted in environment and _matches(environment.split(b"\0"), wanted) and _alive(proc_root / name):
                    found.append(int(name))
    return found


def stamps(prefix: str, proc_root: Path = Path("/proc")) -> list[str]:
    """The stamps, in order, of all living processes whose stamp begins so."""
    found = set()
    for pid in stamped(prefix, proc_root):
        with contextlib.suppress(OSError):
            environment = (proc_root / str(pid) / "environ").read_bytes().split(b"\0")
            found |= {entry.decode(errors="replace") for entry in environment if entry.startswith(prefix.encode())}
    return sorted(found)


def _matches(environment: list[bytes], wanted: bytes) -> bool:
    if wanted.endswith(b":"):
        return any(entry.startswith(wanted) for entry in environment)
    return wanted in environment


def _alive(process: Path) -> bool:
    try:
        stat = (process / "stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
