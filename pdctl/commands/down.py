"""`pdctl down`: stop a service and leave nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, call, find_service
from pdctl.errors import PdctlError
from pdctl.host.users import run_root

_POLL_S = 0.05


def down(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    now: bool = typer.Option(False, "--now", help="Kill instead of stopping cleanly."),
) -> None:
    """Stop the service: the proxy first, then the engines."""
    from pdctl.supervisor.rundir import is_locked

    name = find_service(service, file)
    processes = call(name, "GET", "/v1/status")["processes"]
    call(name, "POST", "/v1/stop")
    if now:
        call(name, "POST", "/v1/stop")
    console.note(f"stopping {name}: {', '.join(process['name'] for process in processes)}")
    deadline = time.monotonic() + 3600
    while is_locked(run_root() / name):
        if time.monotonic() > deadline:
            raise PdctlError(f"service {name!r} is still stopping", f"look at it with: pdctl status -s {name}")
        time.sleep(_POLL_S)
    console.out(f"{name} is down")
