"""The whole tree of a child, found by the stamp in its environment, and emptied.

A stamp survives double forks and new sessions, which a process group or a walk from the parent does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.01


def become_subreaper() -> None:
    """Orphans below us become our children instead of init's, so we can wait for them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stamped(stamp: str, proc_root: Path = Path("/proc")) -> list[int]:
    """Pids of living processes with `stamp` (NAME=value) in their environment; one that ends in a colon is a prefix."""
    wanted = stamp.encode()
    found = []
    for entry in proc_root.iterdir():
        if entry.name.isdigit() and _alive(entry):
            with contextlib.suppress(OSError):
                if _matches((entry / "environ").read_bytes().split(b"\0"), wanted):
                    found.append(int(entry.name))
    return found


def reap_strangers(ours: set[int]) -> None:
    """Wait for adopted orphans that have ended; never for our own children, whose exit status is wanted."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in ours:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, 0)


async def kill_tree(stamp: str, ours: set[int], deadline_s: float) -> list[int]:
    """SIGKILL everything stamped until nothing is left; returns what would not die in time."""
    deadline = time.monotonic() + deadline_s
    while left := stamped(stamp):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap_strangers(ours)
        if time.monotonic() > deadline:
            return left
        await asyncio.sleep(_POLL_S)
    return []


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
