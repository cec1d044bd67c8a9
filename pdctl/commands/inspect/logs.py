"""`pdctl logs`: the process logs of a running service or of its last run."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path

import typer

from pdctl.commands.common import ServiceOption, find_service, node_here
from pdctl.errors import NotRunning, PdctlError
from pdctl.host.users import state_root

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def logs(
    name: str | None = typer.Argument(None, help="Process, such as decode-0; NODE/NAME. Default: all."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Keep printing new lines until Ctrl-C."),
    since: str | None = typer.Option(None, "--since", help="Only lines since then: 10m, 2h, or 2026-11-23T21:00."),
    previous: bool = typer.Option(
        False, "-p", "--previous", help="Also show the logs of earlier starts of the process."
    ),
    file: Path | None = typer.Option(None, "--file", envvar="PDCTL_FILE", help="Topology file."),
    service: str | None = ServiceOption,
) -> None:
    """Show the logs of one process, or of all processes merged by time."""
    import asyncio
    import contextlib

    from pdctl.commands.inspect.follow import Follower, merged

    meant = service_meant(service, file)
    if node_here(meant):
        from pdctl.commands.cluster.logs import show_logs

        show_logs(meant, name, follow, age(since), previous)
        return
    files = _files(meant, name)
    follower = Follower(files)
    merged(files, follower, age(since), previous)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(follower.follow_forever())


def service_meant(service: str | None, file: Path | None) -> str:
    """The service to read logs of. Logs outlive a run, so the default name is used if no service is running."""
    try:
        return find_service(service, file)
    except NotRunning:
        return "pdctl"


def age(since: str | None) -> float:
    """`--since` in seconds since 1970; 0 if not given. Raises PdctlError."""
    if since is None:
        return 0.0
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", since):
        return time.time() - float(found[1]) * _UNITS[found[2]]
    try:
        return datetime.fromisoformat(since).timestamp()
    except ValueError:
        hint = "give a duration, such as 90s, 10m, 2h, 1d, or a time, such as 2026-11-23T21:00"
        raise PdctlError(f"--since {since!r} is not a time", hint) from None


def _files(service: str, name: str | None) -> dict[str, Path]:
    folder = state_root() / service / "logs"
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if not found:
        raise PdctlError(f"service {service!r} has no logs in {folder}", "start it with: pdctl up")
    if name is None:
        return found
    if name not in found:
        raise PdctlError(f"no process {name!r} in service {service!r}", f"known: {', '.join(found)}")
    return {name: found[name]}
