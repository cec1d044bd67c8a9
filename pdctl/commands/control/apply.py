"""`pdctl apply`, `pdctl scale`: from what runs to what is wanted, shown before it is done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import STATE, FileOption, JsonOption, ServiceOption, Status, ask, call, find_service
from pdctl.errors import PdctlError, ServiceFailed

if TYPE_CHECKING:
    from pdctl.plan import Plan

_POLL_S = 0.1
_MARKS = {"added": ("+", "green"), "removed": ("-", "red"), "restarted": ("~", "yellow"), "live": ("*", "cyan")}


def apply(
    file: Path | None = FileOption,
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show what would be done."),
    as_json: bool = JsonOption,
    wait_s: float = typer.Option(7200.0, "--wait", help="Give up watching after this many seconds."),
) -> None:
    """Change the running service over to the edited topology. What did not change is not touched."""
    from pdctl.commands.setup.plan import load_plan

    service = find_service(None, file)
    running = _running_plan(service)
    path = file or (Path(running.source) if running.source and Path(running.source).is_file() else None)
    wanted = load_plan(path, running=running)
    _change_over(service, wanted, dry_run, as_json, wait_s)


def scale(
    groups: list[str] = typer.Argument(..., metavar="GROUP=N...", help="How many replicas, such as decode=3."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show what would be done."),
    as_json: bool = JsonOption,
    wait_s: float = typer.Option(7200.0, "--wait", help="Give up watching after this many seconds."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Start or stop replicas of a group. A later `apply` goes by the file again."""
    from dataclasses import replace

    from pdctl.host import read_host
    from pdctl.plan import make_plan
    from pdctl.topology.loader import load_text

    name = find_service(service, file)
    running = _running_plan(name)
    host = read_host()
    # As the file was when this was started or applied last: edits since then are for `apply`.
    topology = load_text(running.text, running.source or "the running topology", host)
    counts = dict(_count(word) for word in groups)
    known = {group.name: group for group in topology.engines if not group.is_attached}
    for group in counts:
        if group not in known:
            raise PdctlError(f"no group {group!r} of engines that pdctl starts", f"known: {', '.join(known)}")
    now = {group: sum(spec.group == group for spec in running.processes) for group in known}
    engines = tuple(
        replace(group, replicas=counts.get(group.name, now[group.name])) if group.name in known else group
        for group in topology.engines
    )
    _change_over(name, make_plan(replace(topology, engines=engines), host, running), dry_run, as_json, wait_s)


def _count(word: str) -> tuple[str, int]:
    name, sign, count = word.partition("=")
    if not sign or not count.isdecimal() or not 1 <= int(count) <= 256:
        raise PdctlError(f"{word!r} is not GROUP=N with N from 1 to 256", "for example: pdctl scale decode=2")
    return name, int(count)


def _running_plan(service: str) -> Plan:
    import msgspec

    from pdctl.plan import Plan

    return msgspec.convert(call(service, "GET", "/v1/plan"), type=Plan)


def _change_over(service: str, wanted: Plan, dry_run: bool, as_json: bool, wait_s: float) -> None:
    from pdctl.commands.setup.prepare import with_model

    if not dry_run:
        wanted = with_model(wanted)
    body = json.dumps(wanted.to_dict())
    changes = call(service, "POST", "/v1/apply?dry_run=1", body)
    if "added" not in changes:
        raise PdctlError(str(changes.get("reason")))
    if as_json:
        console.out(json.dumps(changes, indent=2))
    else:
        show_changes(changes)
    if dry_run or not any(changes[name] for name in _MARKS):
        return
    ask(service, "/v1/apply", body)
    _follow(service, wait_s)
    console.note("applied")


def show_changes(changes: Status) -> None:
    """One line for each process that is touched, and what stays."""
    import sys

    for name, (mark, colour) in _MARKS.items():
        entries = changes[name] if isinstance(changes[name], dict) else dict.fromkeys(changes[name], "")
        for process, why in entries.items():
            word = "changed while it runs" if name == "live" else name
            console.out(f"{console.paint(mark, colour, sys.stdout)} {process}: {word}" + (f" ({why})" if why else ""))
    if changes["unchanged"]:
        console.out(f"= unchanged: {', '.join(changes['unchanged'])}")


def _follow(service: str, wait_s: float) -> None:
    deadline, shown = time.monotonic() + wait_s, ""
    while time.monotonic() < deadline:
        progress = call(service, "GET", STATE)["apply"] or {}
        if progress.get("step") and progress["step"] != shown:
            shown = progress["step"]
            console.note(shown)
        if progress.get("state") == "done":
            return
        if progress.get("state") == "failed":
            hint = "what ran before still runs; see: pdctl status, pdctl events"
            raise ServiceFailed(f"not applied: {progress['error']}", hint)
        time.sleep(_POLL_S)
    raise ServiceFailed(f"not applied after {wait_s:g} s: {shown}", "it goes on; see: pdctl status")
