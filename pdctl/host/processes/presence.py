"""Which supervisors are alive, even if their files were removed.

A supervisor holds its run directory's lock as long as it lives. If the directory or the lock file was removed, its
open descriptor still identifies it: `/proc/PID/fd` shows the path, followed by " (deleted)".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pdctl.host.processes.stamps import stamped

LOCK = "lock"
_DELETED = " (deleted)"
# The longest time between taking the lock and writing the pid into it, seconds.
_PID_S = 1.0


def is_locked(run_dir: Path) -> bool:
    """Whether a supervisor holds this run directory's lock file."""
    try:
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: two concurrent checks do not take each other for a supervisor.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def supervisor_of(run_dir: Path) -> int | None:
    """The pid of this run directory's living supervisor; None if this user has none."""
    wanted = run_dir.resolve()
    # Check the lock again at the end: it may have been restored meanwhile.
    by_descriptor = (
        next((pid for pid, place in _holders() if place == wanted), None) if not is_locked(run_dir) else None
    )
    return by_descriptor or _named_in_lock(run_dir)


def _named_in_lock(run_dir: Path) -> int | None:
    """The pid in the lock file. A supervisor writes it right after it takes the lock."""
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


def left_running(run_dir: Path) -> list[int]:
    """Pids of a service's processes, by their stamp: its supervisor is not among them."""
    from pdctl.wire import UNIT_ENV  # here, so that commands that find nothing stay quick

    return stamped(f"{UNIT_ENV}={run_dir}:")


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP, Ctrl-Z) or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _holders() -> Iterator[tuple[int, Path]]:
    """(pid, run directory) of every process of this user that holds a removed lock file."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            for descriptor in (process / "fd").iterdir():
                target = str(descriptor.readlink())
                if target.endswith(f"/{LOCK}{_DELETED}"):
                    yield int(process.name), Path(target.removesuffix(_DELETED)).parent
