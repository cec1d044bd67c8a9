"""`pdctl events`: the events of a service, oldest first."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import datetime
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import ServiceOption, control, node_here
from pdctl.commands.inspect.logs import age, service_meant
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.users import state_root

_POLL_S = 0.1
# Until an agent that does not answer is asked again, seconds.
_AGAIN_S = 0.5


def events(
    follow: bool = typer.Option(False, "-f", "--follow", help="Keep printing new events until Ctrl-C."),
    since: str | None = typer.Option(None, "--since", help="Only events since then: 10m, 2h, or 2026-11-23T21:00."),
    name: str | None = typer.Option(None, "--process", help="Only events of this process."),
    file: Path | None = typer.Option(None, "--file", envvar="PDCTL_FILE", help="Topology file."),
    service: str | None = ServiceOption,
) -> None:
    """Print the service's events as JSON lines: starts, readiness, exits, drains, restarts, applies."""
    from pdctl.supervisor.rundir.journal import EVENTS
    from pdctl.supervisor.rundir.journal_reader import JournalReader

    meant = service_meant(service, file)
    if node_here(meant):
        with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
            _show_all_nodes(meant, follow, age(since), name)
        return
    folder = state_root() / meant / "logs"
    if not (folder / EVENTS).exists() and not follow:
        raise PdctlError(f"no events in {folder}", "start the service with: pdctl up")
    reader, after = JournalReader(folder, ""), age(since)
    with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
        while (entries := reader.read()) or follow:
            for entry in entries:
                _show(json.loads(entry.line), after, name)
            if not entries:
                time.sleep(_POLL_S)


def _show(entry: dict[str, object], after: float, name: str | None) -> None:
    names = (None, entry.get("process"), f"{entry.get('node')}/{entry.get('process')}")
    if name in names and _at(entry) >= after:
        console.out(json.dumps(entry))


def _show_all_nodes(service: str, follow: bool, after: float, name: str | None) -> None:
    """The events of a cluster, as this node's agent hears of them. After an agent that was started again it goes on."""
    cursor, is_told = "", False
    while True:
        try:
            for event in control(service).events(cursor, follow):
                cursor, is_told = event.cursor, False
                fields = {"at": event.at, "process": event.process, "event": event.event, "message": event.message}
                _show({**fields, **event.detail, "node": event.node}, after, name)
        except (NotRunning, NotAnswering) as failure:
            if not follow:
                raise
            if not is_told:
                console.note(f"{failure.message}; waiting for it")
            is_told = True
        if not follow:
            return
        time.sleep(_AGAIN_S)


def _at(entry: dict[str, object]) -> float:
    try:
        return datetime.fromisoformat(str(entry["at"])).timestamp()
    except (KeyError, ValueError):
        return 0.0
