"""Which supervisors live, whatever became of their files.

A supervisor holds its run directory's lock for as long as it lives. When the directory or the lock was removed, the
descriptor of the removed file still says whose it is: `/proc/PID/fd` names it, with " (deleted)" behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
_DELETED = " (deleted)"
# From taking the lock to having written the pid into it, at most, seconds.
_PID_S = 1.0


def is_locked(run_dir: Path) -> bool:
    """Whether a supervisor holds this run directory's lock file."""
    try:
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: two that look at once do not take each other for a supervisor.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def supervisor_of(run_dir: Path) -> int | None:
    """The pid of this run directory's living supervisor; None where there is none of this user."""
    wanted = run_dir.resolve()
    # By the lock again at the end: it may have been put back while we looked elsewhere.
    by_descriptor = (
        next((pid for pid, place in _holders() if place == wanted), None) if not is_locked(run_dir) else None
    )
    return by_descriptor or _named_in_lock(run_dir)


def _named_in_lock(run_dir: Path) -> int | None:
    """A supervisor writes its pid right after it takes the lock."""
    deadline = time.monotonic() + _PID_S
    while is_locked(run_dir) and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int((run_dir / LOCK).read_text())
        time.sleep(_PID_S / 100)
    return None


def living_services(root: Path) -> list[str]:
    """Names of the services below `root` that have a living supervisor."""
    found = {entry.name for entry in root.iterdir() if is_locked(entry)} if root.is_dir() else set()
    wanted = root.resolve()
    return sorted(found or {place.name for _, place in _holders() if place.parent == wanted})


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP, Ctrl-Z) or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _holders() -> Iterator[tuple[int, Path]]:
    """(pid, run directory) of every process of this user that holds a lock file that was removed."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            for descriptor in (process / "fd").iterdir():
                target = str(descriptor.readlink())
                if target.endswith(f"/{LOCK}{_DELETED}"):
                    yield int(process.name), Path(target.removesuffix(_DELETED)).parent
