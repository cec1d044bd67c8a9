"""A service that outlives its supervisor: what is written down, and how a later one finds its processes again.

A pid alone is nobody: it is taken together with the process's start time and this boot's id. The exit code of a process
that is not our child is known because the shell that waits for it writes it down.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import msgspec

from pdctl.host.boot import host_id
from pdctl.plan import Plan, ProcessSpec
from pdctl.wire import listener_path

STATE, PLAN, SECRET = "adopt.json", "plan.json", "secret"
_ASK_S = 2.0


class Record(msgspec.Struct, frozen=True):
    """One running process.

    `spec`: what it was started as, whatever a plan says by now; `start_ticks`: proc(5)'s start time; `record`: where
    its exit code will be; `group`: its cgroup, or ""; `started_at`: monotonic, which is one clock for a boot.
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
    last_exit: dict[str, object] | None = None


class Records(msgspec.Struct, frozen=True):
    """All of a service's."""

    host_id: str
    processes: list[Record]


class AdoptableState(msgspec.Struct, frozen=True):
    """What an earlier supervisor left: its plan, its secret, and the processes that still run."""

    plan: Plan
    secret: str
    processes: list[Record]


def read_adoptable(run_dir: Path) -> AdoptableState | None:
    """None where nothing of it runs, or it was not meant to be taken over."""
    try:
        plan = msgspec.json.decode((run_dir / PLAN).read_bytes(), type=Plan)
        records = msgspec.json.decode((run_dir / STATE).read_bytes(), type=Records)
        secret = (run_dir / SECRET).read_text()
    except (OSError, msgspec.DecodeError):
        return None
    if plan.supervision.on_supervisor_death != "survive" or records.host_id != host_id():
        return None
    alive = [record for record in records.processes if start_ticks(record.pid) == record.start_ticks]
    if not alive:
        return None
    # An apply may have been under way: what runs is what the records say.
    running = {record.spec.name: record.spec for record in alive}
    known = [running.pop(spec.name, spec) for spec in plan.processes]
    return AdoptableState(replace(plan, processes=(*known, *running.values())), secret, alive)


def start_ticks(pid: int, proc_root: Path = Path("/proc")) -> int:
    """When a process started, in clock ticks since boot; 0 for one that is gone or a zombie."""
    try:
        words = (proc_root / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in (b"Z", b"X") else int(words[19])


def recorded_pid(record: Path) -> int | None:
    """The leader's pid, as soon as it has one."""
    with contextlib.suppress(OSError, ValueError):
        return int(record.with_name(f"{record.name}.pid").read_text())
    return None


def from_shell(code: int) -> int:
    """A shell's exit code as ours. POSIX shells answer with 128 and the number for a command that a signal ended."""
    return 128 - code if 128 < code <= 128 + 64 else code


def recorded_exit(record: Path) -> int | None:
    """How it ended: a code, or the negative number of a signal; None where that was not written down."""
    with contextlib.suppress(OSError, ValueError):
        return from_shell(int(record.read_text()))
    return None


def listener_from(run_dir: Path, names: list[str]) -> socket.socket | None:
    """The listening socket that a proxy was given, from the proxy: it must stay open while it changes hands."""
    for name in names:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ask:
            ask.settimeout(_ASK_S)
            ask.connect(str(listener_path(run_dir, name)))
            _, descriptors, _, _ = socket.recv_fds(ask, 1, 1)
            if descriptors:
                return socket.socket(fileno=descriptors[0])
    return None
