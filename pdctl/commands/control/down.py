"""`pdctl down`: stop a service and remove everything it left."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.processes.presence import left_running, supervisor_of
from pdctl.host.processes.waiting import readable
from pdctl.host.users import run_root

_DEADLINE_S = 3600.0
# A supervisor that does not answer gets this long after SIGTERM to stop its service, seconds.
_SILENT_S = 90.0
# Processes of a killed supervisor get this long after SIGTERM, then after SIGKILL, seconds.
_TERM_S, _KILL_S = 10.0, 10.0


def down(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    now: bool = typer.Option(False, "--now", help="Kill the processes instead of stopping them cleanly."),
) -> None:
    """Stop the service: the proxy first, then the engines."""
    name = find_service(service, file)
    run_dir = run_root() / name
    try:
        status = control(name).status(measurements=False)
    except NotAnswering:
        _end_silent(name, run_dir, now)
    except NotRunning:
        was_there = _end_leftovers(run_dir)
        if not _give_back(name, file) and not was_there:
            raise
    else:
        if status.nodes:
            _withdraw(name, file, now)
            return
        _stop(name, status.supervisor_pid, [process.name for process in status.processes], now)
    console.out(f"{name} is down")


def _withdraw(name: str, file: Path | None, now: bool) -> None:
    """Stop a service that runs in a cluster, on all nodes. Its agents stay, unless a launcher has started them."""
    from pdctl.commands.cluster.publish import down as withdraw

    if now:
        hint = "stop it without --now; an agent that gets SIGTERM twice kills its node's processes"
        raise PdctlError("--now is for a service on one machine", hint)
    withdraw(name, _DEADLINE_S)
    console.out(f"{name} is down" if _give_back(name, file) else f"{name} is down; its agents run on")


def _give_back(name: str, file: Path | None) -> bool:
    from pdctl.commands.cluster.publish import give_back

    return give_back(name, file)


def _stop(name: str, supervisor_pid: int, processes: list[str], now: bool) -> None:
    """Ask the supervisor to stop, and wait until it has exited. Raises NotRunning, PdctlError."""
    # Wait on the pidfd: the supervisor is gone when it has exited, not when it has released its files.
    with _watched(name, supervisor_pid) as supervisor:
        supervised = control(name)
        supervised.stop()
        if now:
            supervised.stop()
        console.note(f"stopping {name}: {', '.join(reversed(processes))}")
        if not _has_ended(supervisor, _DEADLINE_S):
            raise PdctlError(f"service {name!r} is still stopping", f"see: pdctl status -s {name}")


def _end_silent(name: str, run_dir: Path, now: bool) -> None:
    """Stop a service by signals when its supervisor does not answer. Raises NotRunning, PdctlError."""
    from pdctl.control_api import not_answering

    pid = supervisor_of(run_dir)
    if pid is not None:
        console.note(f"the supervisor (pid {pid}) does not answer; sending it {'SIGKILL' if now else 'SIGTERM'}")
        with _watched(name, pid) as supervisor:
            signal.pidfd_send_signal(supervisor, signal.SIGKILL if now else signal.SIGTERM)
            signal.pidfd_send_signal(supervisor, signal.SIGCONT)
            if not _has_ended(supervisor, _KILL_S if now else _SILENT_S):
                raise not_answering(name, pid)
    _end_leftovers(run_dir)


@contextlib.contextmanager
def _watched(name: str, pid: int) -> Iterator[int]:
    """A pidfd of the process. Raises NotRunning if it has exited."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NotRunning(f"service {name!r} has just stopped") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_ended(descriptor: int, within_s: float) -> bool:
    return bool(readable([descriptor], within_s))


def _end_leftovers(run_dir: Path) -> bool:
    """Stop the processes that a killed supervisor left, and remove its files. Returns whether there was anything."""
    import asyncio
    import shutil

    from pdctl.supervisor.process.tree import SweptTree, end_tree
    from pdctl.wire import UNIT_ENV

    if supervisor_of(run_dir) is not None:
        return False
    found = left_running(run_dir)
    if found:
        console.note(f"the supervisor is gone; stopping its processes: pids {', '.join(map(str, found))}")
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if left := asyncio.run(end_tree(SweptTree(f"{UNIT_ENV}={run_dir}:"), _TERM_S, _KILL_S)):
        raise PdctlError(
            f"pids {left} did not exit after SIGKILL", "they are stuck in the kernel (state D); wait, or reboot"
        )
    was_there = bool(found) or run_dir.is_dir()
    shutil.rmtree(run_dir, ignore_errors=True)
    return was_there
