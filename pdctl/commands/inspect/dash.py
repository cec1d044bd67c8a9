"""`pdctl dash`: the service in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.errors import PdctlError
from pdctl.net import LOOPBACK_PORT


def dash(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    write: bool = typer.Option(
        False,
        "--write",
        help="The link also allows changes: restart, drain, stop, start, role. Default: it only shows.",
    ),
    listen: str = typer.Option(
        "",
        "--listen",
        metavar="HOST:PORT",
        help="Loopback address of the page. Default: dashboard.listen, else 127.0.0.1 and the first free port from "
        "8099.",
    ),
    stop: bool = typer.Option(False, "--stop", help="Close the page, for everyone who has it open."),
) -> None:
    """Open the live page and print its link: engines, links, latency, load, events, requests, exits, findings.

    The link has a token and works on this machine only; from another machine, forward the port with ssh -L.
    """
    if listen and not re.fullmatch(LOOPBACK_PORT, listen):
        raise PdctlError(
            f"--listen {listen}: use a loopback address and a port, such as 127.0.0.1:8099",
            hint="from another machine, forward the port with ssh -L",
        )
    name = find_service(service, file)
    link = control(name).dashboard(listen, write, stop)
    if stop:
        console.note(f"the page of {name} is closed")
        return
    console.out(link)
    if write:
        console.note("whoever has this link can restart and stop engines: do not pass it on")
