"""Named shared memory that a killed process leaves behind.

Python's multiprocessing removes its segments in a helper process, which dies with the tree. What the tree maps is
therefore noted while it runs, and removed once the tree is empty and no other process maps it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_SHM = "/dev/shm"  # noqa: S108 - the kernel's folder of shared memory, not a place for temporary files


def mapped(pids: Iterable[int], proc_root: Path = _PROC, root: str = _SHM) -> set[str]:
    """Files in `root` that these processes map. Takes about a millisecond per process."""
    # A file that has been removed already is listed with the suffix " (deleted)".
    named = re.compile(rb" (" + re.escape(root.encode()) + rb"/[^\n]+)\n")
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names = named.findall((proc_root / str(pid) / "maps").read_bytes())
            found |= {os.fsdecode(name) for name in names if not name.endswith(b" (deleted)")}
    return found


def remove_unused(paths: set[str], proc_root: Path = _PROC, root: str = _SHM) -> list[str]:
    """Remove those of these files that are ours and that no process maps. Returns what was removed."""
    left = {path for path in paths if _is_ours(path)}
    for entry in proc_root.iterdir() if left else ():
        if entry.name.isdecimal():
            left -= mapped([int(entry.name)], proc_root, root)
    for path in left:
        Path(path).unlink(missing_ok=True)
    return sorted(left)


def _is_ours(path: str) -> bool:
    try:
        return Path(path).stat().st_uid == os.geteuid()
    except OSError:
        return False
