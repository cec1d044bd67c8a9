"""`pdctl logs`: what the processes wrote, of a running service or of the last run."""

from __future__ import annotations

from pathlib import Path

import typer

from pdctl.commands.common import ServiceOption, find_service
from pdctl.errors import NotRunning, PdctlError
from pdctl.host.users import state_root

_SHOWN = 64 * 1024


def logs(
    name: str | None = typer.Argument(None, help="One process, such as decode-0. Default: all."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on as lines are written."),
    file: Path | None = typer.Option(None, "--file", envvar="PDCTL_FILE", help="The topology file."),
    service: str | None = ServiceOption,
) -> None:
    """Show logs, all processes or one."""
    import asyncio
    import contextlib

    from pdctl.commands.follow import Follower

    follower = Follower(_files(_service(service, file), name), from_start=True)
    follower.show_new()
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(follower.follow_forever())


def _service(service: str | None, file: Path | None) -> str:
    """Logs outlive a run: without a running service the default name is meant."""
    try:
        return find_service(service, file)
    except NotRunning:
        return "pdctl"


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
