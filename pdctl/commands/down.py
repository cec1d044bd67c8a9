"""`pdctl down`: stop a service and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, call, find_service
from pdctl.errors import NotRunning, PdctlError
from pdctl.host.users import run_root

_DEADLINE_S = 3600.0
# What a killed supervisor left gets this long after TERM, and then SIGKILL, seconds.
_TERM_S, _KILL_S = 10.0, 10.0


def down(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    now: bool = typer.Option(False, "--now", help="Kill instead of stopping cleanly."),
) -> None:
    """Stop the service: the proxy first, then the engines."""
    name = find_service(service, file)
    try:
        status = call(name, "GET", "/v1/status")
    except NotRunning:
        if not _end_leftovers(run_root() / name):
            raise
        console.out(f"{name} is down")
        return
    # By descriptor: the supervisor is gone when it has ended, not when it has let go of its files.
    try:
        supervisor = os.pidfd_open(status["supervisor_pid"])
    except ProcessLookupError:
        raise NotRunning(f"service {name!r} has just ended") from None
    try:
        call(name, "POST", "/v1/stop")
        if now:
            call(name, "POST", "/v1/stop")
        console.note(f"stopping {name}: {', '.join(process['name'] for process in reversed(status['processes']))}")
        ended, _, _ = select.select([supervisor], [], [], _DEADLINE_S)
    finally:
        os.close(supervisor)
    if not ended:
        raise PdctlError(f"service {name!r} is still stopping", f"look at it with: pdctl status -s {name}")
    console.out(f"{name} is down")


def _end_leftovers(run_dir: Path) -> bool:
    """End what a killed supervisor left running; whether there was anything."""
    import asyncio
    import shutil

    from pdctl.supervisor.rundir import is_locked
    from pdctl.supervisor.tree import SweptTree, end_tree, stamped
    from pdctl.wire import UNIT_ENV

    stamp = f"{UNIT_ENV}={run_dir}:"
    found = stamped(stamp)
    if is_locked(run_dir) or not found:
        return False
    console.note(f"its supervisor is gone; ending what it left: pids {', '.join(map(str, found))}")
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if left := asyncio.run(end_tree(SweptTree(stamp), _TERM_S, _KILL_S)):
        raise PdctlError(f"pids {left} do not die", "they are stuck in the kernel (state D); wait, or reboot")
    shutil.rmtree(run_dir, ignore_errors=True)
    return True
