"""`pdctl restart`, `stop`, `start`, `drain`: one process, or all of a group one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import STATE, FileOption, ServiceOption, Status, ask, call, find_service
from pdctl.errors import PdctlError, ServiceFailed

_POLL_S = 0.05
_NameArgument = typer.Argument(..., help="A process, such as decode-0, or a group, such as decode.")
_DrainOption = typer.Option(False, "--drain", help="First let running requests finish; nothing new is sent to it.")
_WaitOption = typer.Option(3600.0, "--wait", help="Give up watching after this many seconds.")


def restart(
    name: str = _NameArgument,
    drain: bool = _DrainOption,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Stop a process and start it again; a group's one after the other."""
    _each(name, "restart", drain, wait_s, find_service(service, file))


def stop(
    name: str = _NameArgument,
    drain: bool = _DrainOption,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Stop a process, and leave it stopped. The whole service: pdctl down."""
    _each(name, "stop", drain, wait_s, find_service(service, file))


def start(
    name: str = _NameArgument,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Start a process that was stopped or has failed; take a drained one into service again."""
    _each(name, "start", False, wait_s, find_service(service, file))


def drain(
    name: str = _NameArgument,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Have nothing new sent to an engine, and wait until it has nothing left; it stays up. Back again: pdctl start."""
    _each(name, "drain", False, wait_s, find_service(service, file))


def _each(name: str, verb: str, drained: bool, wait_s: float, service: str) -> None:
    for process in names_of(call(service, "GET", STATE), name):
        _one(process, verb, drained, wait_s, service)


def names_of(status: Status, name: str) -> list[str]:
    """The processes meant by a name of one, or of a group. Raises PdctlError."""
    known = status["processes"]
    found = [process["name"] for process in known if name in (process["name"], process["group"])]
    if not found:
        names = ", ".join(process["name"] for process in known)
        raise PdctlError(f"no process {name!r} in service {status['service']!r}", f"known: {names}")
    return found


def _one(name: str, verb: str, drained: bool, wait_s: float, service: str) -> None:
    before = process_of(call(service, "GET", STATE), name)
    ask(service, f"/v1/processes/{name}/{verb}" + ("?drain=1" if drained else ""))
    reached: dict[str, Callable[[Status], bool]] = {
        "restart": lambda now: now["state"] == "ready" and now["epoch"] != before["epoch"],
        "stop": lambda now: now["state"] in ("stopped", "failed"),
        "start": lambda now: now["state"] == "ready",
        "drain": lambda now: now["state"] == "drained",
    }
    now = watch(service, name, reached[verb], wait_s)
    word = {"restart": "ready again", "stop": now["state"], "start": "ready", "drain": "drained"}[verb]
    console.out(f"{name} is {word}" + (f", pid {now['pid']}" if now["pid"] else ""))


def watch(service: str, name: str, reached: Callable[[Status], bool], wait_s: float) -> Status:
    """Show what becomes of a process until `reached`. Raises ServiceFailed."""
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        now = process_of(call(service, "GET", STATE), name)
        if reached(now):
            return now
        said = f"{name}: {now['state']}" + (f" ({now['reason']})" if now["reason"] else "")
        if said != shown:
            console.note(said)
            shown = said
        if now["state"] == "failed":
            raise ServiceFailed(f"{name} {now['reason']}", f"look closer with: pdctl why {name} -s {service}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"{name} is still {now['state']} after {wait_s:g} s", "it goes on; see: pdctl status")
        time.sleep(_POLL_S)


def process_of(status: Status, name: str) -> Status:
    """One process of a status. Raises PdctlError."""
    for process in status["processes"]:
        if process["name"] == name:
            found: Status = process
            return found
    raise PdctlError(f"{name} is no longer part of service {status['service']!r}")
