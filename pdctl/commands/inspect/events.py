"""`pdctl events`: everything that happened to a service, oldest first."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from pdctl import console
from pdctl.commands.common import ServiceOption
from pdctl.commands.inspect.logs import age, service_meant
from pdctl.errors import PdctlError
from pdctl.host.users import state_root
from pdctl.supervisor.rundir.journal import EVENTS, parsed, read_entries

_POLL_S = 0.1


def events(
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on as things happen."),
    since: str | None = typer.Option(None, "--since", help="Only from then on: 10m, 2h, or 2026-11-23T21:00."),
    name: str | None = typer.Option(None, "--process", help="Only those of one process."),
    file: Path | None = typer.Option(None, "--file", envvar="PDCTL_FILE", help="The topology file."),
    service: str | None = ServiceOption,
) -> None:
    """Print JSON lines: starts, readiness, exits, drains, restarts, applies."""
    folder = state_root() / service_meant(service, file) / "logs"
    if not (folder / EVENTS).exists() and not follow:
        raise PdctlError(f"no events in {folder}", "start the service with: pdctl up")
    after = age(since)
    for entry in read_entries(folder, EVENTS):
        _show(entry, after, name)
    if follow:
        _follow(folder / EVENTS, after, name)


def _show(entry: dict[str, Any], after: float, name: str | None) -> None:
    if name in (None, entry.get("process")) and _at(entry) >= after:
        console.out(json.dumps(entry))


def _at(entry: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(entry["at"])).timestamp()
    except (KeyError, ValueError):
        return 0.0


def _follow(path: Path, after: float, name: str | None) -> None:
    """Lines as they are written; a file that takes the old one's place is read from its start."""
    inode, place, rest = 0, 0, b""
    if path.exists():
        inode, place = path.stat().st_ino, path.stat().st_size
    try:
        while True:
            time.sleep(_POLL_S)
            if not path.exists():
                continue
            found = path.stat()
            if found.st_ino != inode:
                inode, place, rest = found.st_ino, 0, b""
            if found.st_size <= place:
                continue
            with path.open("rb") as file:
                file.seek(place)
                data = file.read()
            place += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for entry in parsed(lines):
                _show(entry, after, name)
    except KeyboardInterrupt:
        return
