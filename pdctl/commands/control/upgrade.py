"""`pdctl upgrade`: this version of pdctl takes over a running service."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import __version__, console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, control, find_service
from pdctl.commands.control.apply import follow_apply, show_changes, wanted_plan
from pdctl.errors import NotAnswering, NotRunning, PdctlError, ServiceFailed
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.plan import Plan

_POLL_S = 0.1
# The new supervisor answers within this time, seconds; it starts in less than one.
_ANSWER_S = 60.0


def upgrade(
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the changes without making them."),
    as_json: bool = JsonOption,
    wait_s: float = typer.Option(7200.0, "--wait", help="Stop waiting after this many seconds; the change continues."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Have this version of pdctl take over the running service: the supervisor, then every process that changes.

    Engines are drained and restarted one by one. With `takeover` in [proxy], no client's connection is cut.
    """
    from pdctl.plan.changes import diff, with_roles

    name = find_service(service, file)
    supervised = control(name)
    running = supervised.plan()
    if running.node:
        hint = "install the new version, then restart the agents one by one: systemctl restart pdctl-agent"
        raise PdctlError("the agents of a cluster are upgraded by a restart", hint)
    before = supervised.status(measurements=False)
    wanted = wanted_plan(file, running)
    changes = diff(running, with_roles(running, wanted))
    if as_json:
        console.out(json.dumps({"from": before.version, "to": __version__} | changes.to_dict(), indent=2))
    else:
        console.note(f"pdctl {before.version or 'of before'} to {__version__}")
        show_changes(changes)
    if dry_run:
        return
    _succeed(name, wanted, before.supervisor_epoch)
    if not changes.is_empty:
        follow_apply(name, wait_s)
    console.note(f"{name} is supervised by pdctl {__version__}")


def _succeed(service: str, wanted: Plan, epoch: str) -> None:
    """Have the supervisor become this version's, and wait until that one answers. Raises ServiceFailed."""
    from pdctl.commands.setup.prepare import with_model

    wanted = with_model(wanted)
    control(service).upgrade(program.part("pdctl.supervisor"), wanted)
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        try:
            if control(service).status(measurements=False).supervisor_epoch != epoch:
                return
        except (NotRunning, NotAnswering):
            continue
    hint = f"the service runs on; see: pdctl status -s {service}, pdctl logs -s {service} supervisor"
    raise ServiceFailed("the supervisor has not become this version", hint)
