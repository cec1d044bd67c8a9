"""`pdctl down`: stop a service and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, call, find_service, left_running, not_answering
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.users import run_root

_DEADLINE_S = 3600.0
# A supervisor that does not answer has this long after TERM to end its service, seconds.
_SILENT_S = 90.0
# What a killed supervisor left gets this long after TERM, and then SIGKILL, seconds.
_TERM_S, _KILL_S = 10.0, 10.0


def down(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    now: bool = typer.Option(False, "--now", help="Kill instead of stopping cleanly."),
) -> None:
    """Stop the service: the proxy first, then the engines."""
    name = find_service(service, file)
    run_dir = run_root() / name
    try:
        status = call(name, "GET", "/v1/status?measurements=0")
    except NotAnswering:
        _end_silent(name, run_dir, now)
    except NotRunning:
        if not _end_leftovers(run_dir):
            raise
    else:
        _stop(name, status["supervisor_pid"], [process["name"] for process in status["processes"]], now)
    console.out(f"{name} is down")


def _stop(name: str, supervisor_pid: int, processes: list[str], now: bool) -> None:
    """Ask the supervisor, and wait for its end. Raises NotRunning, PdctlError."""
    # By descriptor: the supervisor is gone when it has ended, not when it has let go of its files.
    with _watched(name, supervisor_pid) as supervisor:
        call(name, "POST", "/v1/stop")
        if now:
            call(name, "POST", "/v1/stop")
        console.note(f"stopping {name}: {', '.join(reversed(processes))}")
        if not _has_ended(supervisor, _DEADLINE_S):
            raise PdctlError(f"service {name!r} is still stopping", f"look at it with: pdctl status -s {name}")


def _end_silent(name: str, run_dir: Path, now: bool) -> None:
    """End a service whose supervisor lives and does not answer, by its processes. Raises NotRunning, PdctlError."""
    from pdctl.supervisor.rundir.presence import supervisor_of

    pid = supervisor_of(run_dir)
    if pid is not None:
        console.note(f"its supervisor (pid {pid}) does not answer; {'killing' if now else 'stopping'} it by a signal")
        with _watched(name, pid) as supervisor:
            signal.pidfd_send_signal(supervisor, signal.SIGKILL if now else signal.SIGTERM)
            signal.pidfd_send_signal(supervisor, signal.SIGCONT)
            if not _has_ended(supervisor, _KILL_S if now else _SILENT_S):
                raise not_answering(name, pid)
    _end_leftovers(run_dir)


@contextlib.contextmanager
def _watched(name: str, pid: int) -> Iterator[int]:
    """A descriptor of the process. Raises NotRunning where it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NotRunning(f"service {name!r} has just ended") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_ended(descriptor: int, within_s: float) -> bool:
    ended, _, _ = select.select([descriptor], [], [], within_s)
    return bool(ended)


def _end_leftovers(run_dir: Path) -> bool:
    """End what a killed supervisor left running, and remove its files; whether there was anything."""
    import asyncio
    import shutil

    from pdctl.supervisor.process.tree import SweptTree, end_tree
    from pdctl.supervisor.rundir.presence import supervisor_of
    from pdctl.wire import UNIT_ENV

    if supervisor_of(run_dir) is not None:
        return False
    found = left_running(run_dir)
    if found:
        console.note(f"its supervisor is gone; ending what it left: pids {', '.join(map(str, found))}")
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if left := asyncio.run(end_tree(SweptTree(f"{UNIT_ENV}={run_dir}:"), _TERM_S, _KILL_S)):
        raise PdctlError(f"pids {left} do not die", "they are stuck in the kernel (state D); wait, or reboot")
    was_there = bool(found) or run_dir.is_dir()
    shutil.rmtree(run_dir, ignore_errors=True)
    return was_there
