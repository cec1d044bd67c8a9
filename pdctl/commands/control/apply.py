"""`pdctl apply` and `pdctl scale`: change a running service. The changes are printed before they are made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, control, find_service, topology_file
from pdctl.errors import PdctlError, ServiceFailed

if TYPE_CHECKING:
    from pdctl.control_api import NodeChanges
    from pdctl.plan import Plan
    from pdctl.plan.changes import Changes

_POLL_S = 0.1


def apply(
    file: Path | None = FileOption,
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the changes without making them."),
    as_json: bool = JsonOption,
    wait_s: float = typer.Option(7200.0, "--wait", help="Stop waiting after this many seconds; the change continues."),
) -> None:
    """Apply the edited topology to the running service. Unchanged processes keep running."""
    service = find_service(None, file)
    running = control(service).plan()
    if running.node:
        from pdctl.commands.cluster.publish import apply_file

        apply_file(service, topology_file(file), dry_run, as_json, wait_s)
        return
    change_over(service, wanted_plan(file, running), dry_run, as_json, wait_s)


def wanted_plan(file: Path | None, running: Plan) -> Plan:
    """The plan of a topology; by default of the file from which the service was started, if it is still there."""
    from pdctl.commands.setup.plan import load_plan

    path = file or (Path(running.source) if running.source and Path(running.source).is_file() else None)
    return load_plan(path, running=running)


def scale(
    groups: list[str] = typer.Argument(
        ..., metavar="GROUP=N...", help="Number of replicas per engine group, such as decode=3."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the changes without making them."),
    as_json: bool = JsonOption,
    wait_s: float = typer.Option(7200.0, "--wait", help="Stop waiting after this many seconds; the change continues."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Change the number of replicas of an engine group. A later `apply` uses the file's numbers again."""
    from dataclasses import replace

    from pdctl.host import read_host
    from pdctl.plan import make_plan
    from pdctl.topology.loader import load_text

    name = find_service(service, file)
    running = control(name).plan()
    if running.node:
        from pdctl.commands.cluster.scale import scale_published

        scale_published(name, dict(_count(word) for word in groups), dry_run, as_json, wait_s)
        return
    host = read_host()
    # The file as it was at the last start or apply: later edits are left to `apply`.
    topology = load_text(running.text, running.source or "the running topology", host)
    counts = dict(_count(word) for word in groups)
    known = {group.name: group for group in topology.engines if not group.is_attached}
    for group in counts:
        if group not in known:
            raise PdctlError(f"pdctl starts no engine group {group!r}", f"known: {', '.join(known)}")
    now = {group: sum(spec.group == group for spec in running.processes) for group in known}
    engines = tuple(
        replace(group, replicas=counts.get(group.name, now[group.name])) if group.name in known else group
        for group in topology.engines
    )
    change_over(name, make_plan(replace(topology, engines=engines), host, running), dry_run, as_json, wait_s)


def _count(word: str) -> tuple[str, int]:
    name, sign, count = word.partition("=")
    if not sign or not count.isdecimal() or not 1 <= int(count) <= 256:
        raise PdctlError(f"{word!r} is not GROUP=N with N from 1 to 256", "for example: pdctl scale decode=2")
    return name, int(count)


def change_over(service: str, wanted: Plan, dry_run: bool, as_json: bool, wait_s: float) -> None:
    """Print the changes, make them and wait. Raises ServiceFailed."""
    from pdctl.commands.setup.prepare import with_model

    if not dry_run:
        wanted = with_model(wanted)
    supervised = control(service)
    changes = supervised.changes(wanted)
    if as_json:
        console.out(json.dumps(changes.to_dict(), indent=2))
    else:
        show_changes(changes)
    if dry_run or changes.is_empty:
        return
    supervised.apply(wanted)
    follow_apply(service, wait_s)
    console.note("applied")


def show_changes(changes: Changes | NodeChanges, node: str = "") -> None:
    """Print one line per changed process, then the unchanged ones. `node`: what their names begin with."""
    import sys

    lines = [
        *(("+", "green", process, "added", "") for process in changes.added),
        *(("-", "red", process, "removed", "") for process in changes.removed),
        *(("~", "yellow", process, "restarted", why) for process, why in changes.restarted.items()),
        *(("*", "cyan", process, "changed without a restart", why) for process, why in changes.live.items()),
    ]
    for mark, colour, process, word, why in lines:
        console.out(f"{console.paint(mark, colour, sys.stdout)} {node}{process}: {word}" + (f" ({why})" if why else ""))
    if changes.unchanged:
        console.out(f"= unchanged: {', '.join(f'{node}{process}' for process in changes.unchanged)}")


def follow_apply(service: str, wait_s: float) -> None:
    """Print the steps of the apply that is under way, until it is done. Raises ServiceFailed."""
    deadline, shown = time.monotonic() + wait_s, ""
    while time.monotonic() < deadline:
        progress = control(service).status(measurements=False).apply
        if progress is not None and progress.step and progress.step != shown:
            shown = progress.step
            console.note(shown)
        if progress is not None and progress.state == "done":
            return
        if progress is not None and progress.state == "failed":
            hint = "the processes of before are still running; see: pdctl status, pdctl events"
            raise ServiceFailed(f"not applied: {progress.error}", hint)
        time.sleep(_POLL_S)
    raise ServiceFailed(f"not applied after {wait_s:g} s: {shown}", "the supervisor continues; see: pdctl status")
