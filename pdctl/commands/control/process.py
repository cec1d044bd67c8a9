"""`pdctl restart`, `stop`, `start`, `drain`: for one process, or for each process of a group in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.errors import PdctlError, ServiceFailed

if TYPE_CHECKING:
    from pdctl.control_api import ProcessStatus, ServiceStatus, Verb

_POLL_S = 0.05
# In a cluster each look asks every node.
_CLUSTER_POLL_S = 0.3
_NameArgument = typer.Argument(
    ..., help="Process, such as decode-0, or engine group, such as decode; in a cluster, also NODE/NAME."
)
_DrainOption = typer.Option(
    False, "--drain", help="First stop sending requests to it and let its running requests finish."
)
_WaitOption = typer.Option(3600.0, "--wait", help="Stop waiting after this many seconds; the operation continues.")


def restart(
    name: str = _NameArgument,
    drain: bool = _DrainOption,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Stop a process and start it again. The processes of a group are restarted one after another."""
    _each(name, "restart", drain, wait_s, find_service(service, file))


def stop(
    name: str = _NameArgument,
    drain: bool = _DrainOption,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Stop a process and keep it stopped. To stop the service, use `pdctl down`."""
    _each(name, "stop", drain, wait_s, find_service(service, file))


def start(
    name: str = _NameArgument,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Start a stopped or failed process, or put a drained engine back into service."""
    _each(name, "start", False, wait_s, find_service(service, file))


def drain(
    name: str = _NameArgument,
    wait_s: float = _WaitOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Stop sending requests to an engine and wait until it is idle. It keeps running; `pdctl start` puts it back."""
    _each(name, "drain", False, wait_s, find_service(service, file))


def _each(name: str, verb: Verb, drained: bool, wait_s: float, service: str) -> None:
    for process in names_of(control(service).status(measurements=False), name):
        _one(process, verb, drained, wait_s, service)


def names_of(status: ServiceStatus, name: str) -> list[str]:
    """The processes that match a process or group name. Raises PdctlError if there are none."""
    found = [process.name for process in status.processes if name in (process.group, *_names(process))]
    if not found:
        names = ", ".join(process.name for process in status.processes)
        raise PdctlError(f"no process {name!r} in service {status.service!r}", f"known: {names}{_missing(status)}")
    return found


def _names(process: ProcessStatus) -> tuple[str, ...]:
    """What a process may be called: in a cluster, NODE/NAME too."""
    return (process.name, f"{process.node}/{process.name}") if process.node else (process.name,)


def _missing(status: ServiceStatus) -> str:
    silent = [node.name for node in status.nodes if node.state == "silent"]
    return f"; no answer from {', '.join(silent)}" if silent else ""


def _one(name: str, verb: Verb, drained: bool, wait_s: float, service: str) -> None:
    before = process_of(control(service).status(measurements=False), name)
    control(service).act(name, verb, drained)
    reached: dict[Verb, Callable[[ProcessStatus], bool]] = {
        "restart": lambda now: now.state == "ready" and now.epoch != before.epoch,
        "stop": lambda now: now.state in ("stopped", "failed"),
        "start": lambda now: now.state == "ready",
        "drain": lambda now: now.state == "drained",
    }
    now = watch(service, name, reached[verb], wait_s)
    word = {"restart": "ready again", "stop": now.state, "start": "ready", "drain": "drained"}[verb]
    console.out(f"{name} is {word}" + (f", pid {now.pid}" if now.pid else ""))


def watch(service: str, name: str, reached: Callable[[ProcessStatus], bool], wait_s: float) -> ProcessStatus:
    """Print a process's state changes until `reached` is true. Raises ServiceFailed on failure or timeout."""
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        status = control(service).status(measurements=False)
        if (now := _found(status, name)) is None and not _missing(status):
            raise _gone(status, name)
        if now is not None and reached(now):
            return now
        # A node that does not answer goes on with what it was told.
        state = now.state if now is not None else _missing(status).removeprefix("; ")
        said = f"{name}: {state}" + (f" ({now.reason})" if now is not None and now.reason else "")
        if said != shown:
            console.note(said)
            shown = said
        if now is not None and now.state == "failed":
            raise ServiceFailed(f"{name} {now.reason}", f"see the cause with: pdctl why {name} -s {service}")
        if time.monotonic() > deadline:
            raise ServiceFailed(
                f"{name} is still {state} after {wait_s:g} s", "the operation continues; see: pdctl status"
            )
        time.sleep(_CLUSTER_POLL_S if status.nodes else _POLL_S)


def process_of(status: ServiceStatus, name: str) -> ProcessStatus:
    """One process of a status. Raises PdctlError if it is not there."""
    if (process := _found(status, name)) is not None:
        return process
    raise _gone(status, name)


def _found(status: ServiceStatus, name: str) -> ProcessStatus | None:
    return next((process for process in status.processes if name in _names(process)), None)


def _gone(status: ServiceStatus, name: str) -> PdctlError:
    return PdctlError(f"{name} is no longer part of service {status.service!r}{_missing(status)}")
