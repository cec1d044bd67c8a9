"""`pdctl top`: the service on the screen of a terminal, with keys."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.commands.inspect.status import status
from pdctl.host.users import run_root


def top(file: Path | None = FileOption, service: str | None = ServiceOption) -> None:
    """Show the service on the full screen: topology, engines, load, latencies, KV links and events.

    Keys choose and sort processes, show logs and restart; ? lists them. Without a terminal: as `pdctl status -w`.
    """
    if not _is_terminal():
        console.note("no terminal: showing pdctl status -w")
        status(file=file, service=service, as_json=False, keys=False, watch=True)
        return
    name = find_service(service, file)
    first = control(name).status(measurements=False)
    # Only here: no other verb needs rich.
    from pdctl.commands.top.feed import Feed
    from pdctl.commands.top.session import Session

    run_dir = run_root() / name
    Session(run_dir, Feed(run_dir, Path(first.log_dir), first)).run()


def _is_terminal() -> bool:
    """Whether there is a terminal for input and output that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
