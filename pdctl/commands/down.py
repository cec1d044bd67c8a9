"""`pdctl down`: stop a service and leave nothing behind."""

from __future__ import annotations

import os
import select
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, call, find_service
from pdctl.errors import NotRunning, PdctlError

_DEADLINE_S = 3600.0


def down(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    now: bool = typer.Option(False, "--now", help="Kill instead of stopping cleanly."),
) -> None:
    """Stop the service: the proxy first, then the engines."""
    name = find_service(service, file)
    status = call(name, "GET", "/v1/status")
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
