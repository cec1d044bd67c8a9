"""Processes by a stamp (NAME=value) in their environment: children keep it across double forks and new sessions.

A program that changes its title with setproctitle overwrites its environment, as vLLM's and SGLang's workers do. Such a
process belongs to the stamp of its session: pdctl starts every process in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class _Stat(NamedTuple):
    is_alive: bool
    session: int


def stamped(stamp: str, proc_root: Path = _PROC, session: int = 0) -> list[int]:
    """Pids of living processes with `stamp` (NAME=value); one that ends in a colon is a prefix.

    Includes processes that have overwritten their environment, if their session is `session`, or is that of a process
    with the stamp and its leader has the stamp or is gone.
    """
    wanted = stamp.encode()
    found: list[int] = []
    sessions, unknown = {session} - {0}, list[tuple[int, int]]()
    for name in os.listdir(proc_root):  # noqa: PTH208 - hundreds of Path objects would cost more than the reading
        if not name.isdigit():
            continue
        environment = _environment(proc_root, name)
        if wanted in environment and _matches(environment.split(b"\0"), wanted):
            stat = _stat(proc_root, name)
            if stat.is_alive:
                found.append(int(name))
                sessions.add(stat.session)
        elif b"=" not in environment.partition(b"\0")[0]:
            stat = _stat(proc_root, name)
            if stat.is_alive and stat.session:
                unknown.append((int(name), stat.session))
    if unknown:
        ours = {one for one in sessions if one == session or one in found or not (proc_root / str(one)).exists()}
        found += [pid for pid, in_session in unknown if in_session in ours]
    return found


def stamps(prefix: str, proc_root: Path = _PROC) -> list[str]:
    """The stamps, in order, of all living processes whose stamp begins so."""
    found = set()
    for pid in stamped(prefix, proc_root):
        environment = _environment(proc_root, str(pid)).split(b"\0")
        found |= {entry.decode(errors="replace") for entry in environment if entry.startswith(prefix.encode())}
    return sorted(found)


def stamp_of(pid: int, name: str, proc_root: Path = _PROC) -> str:
    """The value of the stamp `name` of a process, or of its session's leader; "" if neither has it."""
    wanted = f"{name}=".encode()
    for one in (pid, _stat(proc_root, str(pid)).session):
        for entry in _environment(proc_root, str(one)).split(b"\0"):
            if entry.startswith(wanted):
                return entry.removeprefix(wanted).decode(errors="replace")
    return ""


def _matches(environment: list[bytes], wanted: bytes) -> bool:
    if wanted.endswith(b":"):
        return any(entry.startswith(wanted) for entry in environment)
    return wanted in environment


def _environment(proc_root: Path, pid: str) -> bytes:
    with contextlib.suppress(OSError), open(f"{proc_root}/{pid}/environ", "rb") as file:  # noqa: PTH123 - see stamped
        return file.read()
    return b""


def _stat(proc_root: Path, pid: str) -> _Stat:
    try:
        with open(f"{proc_root}/{pid}/stat", "rb") as file:  # noqa: PTH123 - see stamped
            # After the name in brackets: state, parent, process group, session (proc(5)).
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return _Stat(False, 0)
    return _Stat(fields[0] not in (b"Z", b"X"), int(fields[3]))
