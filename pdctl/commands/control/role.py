"""`pdctl role`: give an engine another role while the service runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.commands.control.process import process_of, watch
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.control_api import ProcessStatus, RoleName

_ROLES: tuple[RoleName, ...] = ("prefill", "decode", "hybrid")


def role(
    name: str = typer.Argument(..., help="Engine, such as decode-0."),
    wanted: str = typer.Argument(..., metavar="ROLE", help="Its new role: prefill, decode or hybrid."),
    drain_s: float | None = typer.Option(
        None,
        "--drain",
        metavar="S",
        min=0,
        max=86400,
        help="Answers that still run after this many seconds go on at other engines. Default: supervisor.drain_s.",
    ),
    now: bool = typer.Option(False, "--now", help="Let them go on at other engines at once."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would happen."),
    wait_s: float = typer.Option(3600.0, "--wait", help="Stop waiting after this many seconds; the change continues."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Give an engine another role. It takes new work of that role at once, and ends what it has: no request is lost.

    The role is kept over restarts and `pdctl apply`, until the topology's own role for the engine changes.
    """  # fmt: skip
    chosen = next((one for one in _ROLES if one == wanted), None)
    if chosen is None:
        raise PdctlError(f"unknown role {wanted!r}", f"choose one of: {', '.join(_ROLES)}")
    found = find_service(service, file)
    process = process_of(control(found).status(measurements=False), name)
    if process.role == chosen:
        console.out(f"{name} is {chosen}" + (" already" if not process.leaving_role else "; its change is in progress"))
        return
    # In a cluster, the node that runs it says whether its role can change.
    if process.is_engine and not process.node and not _switches(found, name):
        _restarted(found, name, chosen, dry_run, wait_s)
        return
    control(found).change_role(name, chosen, 0.0 if now else drain_s, dry_run)
    if dry_run:
        console.out(f"{name}: {process.role} to {chosen}, without a restart")
        return
    _wait(found, name, wait_s)
    console.out(f"{name} is {chosen}")


def _switches(service: str, name: str) -> bool:
    """Whether an engine's role can change while it runs."""
    return next(spec for spec in control(service).plan().processes if spec.name == name).switches


def _wait(service: str, name: str, wait_s: float) -> None:
    """Until the engine has ended its work of the role before. Raises ServiceFailed."""
    said = ""

    def is_done(now: ProcessStatus) -> bool:
        nonlocal said
        if now.leaving_role and said != now.leaving_role:
            said = now.leaving_role
            what = "prompts for peers" if said == "prefill" else "answers"
            console.note(f"{name} is {now.role}; hybrid until its {what} have ended")
        return not now.leaving_role

    watch(service, name, is_done, wait_s)


def _restarted(service: str, name: str, role: RoleName, dry_run: bool, wait_s: float) -> None:
    """Change the role in the running topology: a drained restart."""
    from dataclasses import replace

    from pdctl.commands.control.apply import change_over
    from pdctl.host import read_host
    from pdctl.plan import make_plan
    from pdctl.topology.loader import load_text
    from pdctl.topology.spec import Role

    running = control(service).plan()
    host = read_host()
    topology = load_text(running.text, running.source or "the running topology", host)
    group = next(spec.group for spec in running.processes if spec.name == name)
    count = sum(spec.group == group for spec in running.processes)
    if count > 1:
        hint = "give this engine an [[engines]] entry of its own, then: pdctl apply"
        raise PdctlError(f"{name} is one of {count} engines of group {group!r}, which must have one role", hint)
    engines = tuple(replace(one, role=Role(role)) if one.name == group else one for one in topology.engines)
    console.note(f"engines of this kind cannot change their role while they run: {name} is drained and restarted")
    change_over(service, make_plan(replace(topology, engines=engines), host, running), dry_run, False, wait_s)
