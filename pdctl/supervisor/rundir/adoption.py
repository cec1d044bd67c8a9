"""A service that outlives its supervisor: its records, and how a later supervisor finds its processes again.

A pid alone does not identify a process; it is used together with the process's start time and the boot id. The exit
code of a process that is not a child is known because the shell that waits for it writes it to a file.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import msgspec

from pdctl.control_api import LastExit
from pdctl.host.boot import host_id
from pdctl.plan import Plan, ProcessSpec
from pdctl.proxy_wire import listener_path

STATE, PLAN, SECRET = "adopt.json", "plan.json", "secret"
_ASK_S = 2.0


class Record(msgspec.Struct, frozen=True):
    """One running process.

    `spec`: as it was started, even if the plan has changed since; `start_ticks`: the start time of proc(5); `record`:
    the file for its exit code; `group`: its cgroup, or ""; `started_at`: monotonic, a clock that is valid for one boot.
    """

    spec: ProcessSpec
    pid: int
    start_ticks: int
    epoch: str
    starts: int
    phase: str
    record: str
    group: str
    started_at: float
    ready_since: str | None = None
    last_exit: LastExit | None = None


class Records(msgspec.Struct, frozen=True):
    """All records of a service."""

    host_id: str
    processes: list[Record]


class AdoptableState(msgspec.Struct, frozen=True):
    """What an earlier supervisor left: its plan, its secret, and the processes that are still running."""

    plan: Plan
    secret: str
    processes: list[Record]


def read_adoptable(run_dir: Path, is_succession: bool = False) -> AdoptableState | None:
    """The state to adopt; None if none of its processes run, or if the service does not outlive its supervisor.
    `is_succession`: that supervisor was this process."""
    try:
        plan = msgspec.json.decode((run_dir / PLAN).read_bytes(), type=Plan)
        records = msgspec.json.decode((run_dir / STATE).read_bytes(), type=Records)
        secret = (run_dir / SECRET).read_text()
    except (OSError, msgspec.DecodeError):
        return None
    survives = plan.supervision.on_supervisor_death == "survive" or is_succession
    if not survives or records.host_id != host_id():
        return None
    alive = [record for record in records.processes if start_ticks(record.pid) == record.start_ticks]
    if not alive:
        return None
    # An apply may have been in progress: the records say what runs.
    running = {record.spec.name: record.spec for record in alive}
    known = [running.pop(spec.name, spec) for spec in plan.processes]
    return AdoptableState(replace(plan, processes=(*known, *running.values())), secret, alive)


def start_ticks(pid: int, proc_root: Path = Path("/proc")) -> int:
    """When a process started, in clock ticks since boot; 0 if it is gone or a zombie."""
    try:
        words = (proc_root / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in (b"Z", b"X") else int(words[19])


def recorded_pid(record: Path) -> int | None:
    """The leader's pid; None before the leader has written it."""
    with contextlib.suppress(OSError, ValueError):
        return int(record.with_name(f"{record.name}.pid").read_text())
    return None


def from_shell(code: int) -> int:
    """Convert a shell's exit code. POSIX shells return 128 plus the signal number for a command killed by a signal."""
    return 128 - code if 128 < code <= 128 + 64 else code


def recorded_exit(record: Path) -> int | None:
    """How it ended: an exit code, or a negative signal number; None if no record was written."""
    with contextlib.suppress(OSError, ValueError):
        return from_shell(int(record.read_text()))
    return None


def listener_from(run_dir: Path, names: list[str]) -> socket.socket | None:
    """Get a proxy's listening socket back from the proxy, so that the socket stays open during the takeover."""
    for name in names:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ask:
            ask.settimeout(_ASK_S)
            ask.connect(str(listener_path(run_dir, name)))
            _, descriptors, _, _ = socket.recv_fds(ask, 1, 1)
            if descriptors:
                return socket.socket(fileno=descriptors[0])
    return None
