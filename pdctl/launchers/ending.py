"""End a service's agent on this node, and whatever it or a killed one has left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from pdctl.errors import PdctlError
from pdctl.host.processes.presence import left_running, supervisor_of
from pdctl.host.processes.waiting import readable
from pdctl.host.users import run_root
from pdctl.launchers.node import control_group, file_of
from pdctl.names.services import checked_service
from pdctl.supervisor.process.tree import SweptTree, end_tree, kill_quietly
from pdctl.wire import UNIT_ENV

# An agent drains its engines' streams first. With `now` it has less time, then it is killed with all below it. Seconds.
_DRAIN_S, _NOW_S = 600.0, 2.0
_TERM_S, _KILL_S = 10.0, 10.0


def end_agent(service: str, now: bool) -> bool:
    """Returns whether there was anything to end. Raises PdctlError."""
    run_dir = run_root() / checked_service(service)
    was_there = _end_supervisor(run_dir, now)
    if found := left_running(run_dir):
        was_there = True
        for pid in found:
            kill_quietly(pid, signal.SIGTERM)
        if left := asyncio.run(end_tree(SweptTree(f"{UNIT_ENV}={run_dir}:"), _TERM_S, _KILL_S)):
            raise PdctlError(f"pids {left} did not exit after SIGKILL")
    shutil.rmtree(run_dir, ignore_errors=True)
    file_of(service).unlink(missing_ok=True)
    if group := control_group(service):
        with contextlib.suppress(OSError):
            group.rmdir()
    return was_there


def _end_supervisor(run_dir: Path, now: bool) -> bool:
    pid = supervisor_of(run_dir)
    if pid is None:
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # A second signal asks it not to drain.
        for _ in range(2 if now else 1):
            signal.pidfd_send_signal(process, signal.SIGTERM)
            signal.pidfd_send_signal(process, signal.SIGCONT)
            if _has_ended(process, _NOW_S / 2 if now else _DRAIN_S):
                return True
        signal.pidfd_send_signal(process, signal.SIGKILL)
        _has_ended(process, _KILL_S)
    except ProcessLookupError:
        return True
    finally:
        os.close(process)
    return True


def _has_ended(process: int, within_s: float) -> bool:
    return bool(readable([process], within_s))
