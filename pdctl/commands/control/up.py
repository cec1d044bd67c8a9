"""`pdctl up`: start a service, in the foreground or detached."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from pdctl import console
from pdctl.commands.common import FileOption, control, find_service, is_interactive, read_topology, topology_file
from pdctl.commands.setup.plan import load_plan, warn_of_gpus
from pdctl.errors import AlreadyRunning, NotAnswering, NotRunning, PdctlError, PortsTaken, ServiceFailed, first_of
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.control_api import ProcessStatus, ServiceStatus
    from pdctl.plan import Plan

_POLL_S = 0.1
_LAST_LINES = 12
# Plans that are tried where each time another service claims one of the ports at the same moment.
_MOST_PLANS = 4


def up(
    file: Path | None = FileOption,
    detach: bool = typer.Option(
        False, "-d", "--detach", help="Run in the background: return when the service is ready or has failed."
    ),
    force: bool = typer.Option(False, "--force", help="Start despite critical findings of the doctor."),
    wait_s: float = typer.Option(
        1800.0,
        "--wait",
        help="With -d: stop the service if it is not ready after this many seconds. In a cluster: stop waiting.",
    ),
) -> None:
    """Start the service, or take over the processes of a killed supervisor. Ctrl-C stops it; a second Ctrl-C kills.

    With [cluster] in the topology: publish it through the agent of this machine, and return when all nodes are ready.
    """
    path = topology_file(file)
    if path is not None and "cluster" in read_topology(path):
        from pdctl.commands.cluster.publish import up as publish

        if force:
            raise PdctlError("--force is for a service on one machine", "check a node with: pdctl doctor")
        publish(path, find_service(None, path), wait_s)
        return
    planned = _first_plan(file, force)
    warn_of_gpus(planned)
    for left in reversed(range(_MOST_PLANS)):
        try:
            _start(planned, detach, wait_s)
            return
        except PortsTaken as failure:
            if not left:
                raise
            other = load_plan(file, check_port=True)
            if _ports(other) == _ports(planned):
                raise PdctlError(failure.message, "the topology sets this port: change it there") from None
            console.note(f"{failure.message}; choosing others")
            planned = other


def _ports(planned: Plan) -> set[int]:
    return {port for spec in planned.processes for port in spec.ports.values()}


def _first_plan(file: Path | None, force: bool) -> Plan:
    """The plan for a start, or for taking over what runs. Raises PdctlError if neither can work."""
    from pdctl.commands.setup.precheck import refuse_what_cannot_work
    from pdctl.host.processes.presence import supervisor_of
    from pdctl.supervisor.rundir.adoption import read_adoptable

    planned = load_plan(file)
    if supervisor_of(Path(planned.run_dir)) is not None:
        hint = f"see it with: pdctl status -s {planned.service}    stop it with: pdctl down -s {planned.service}"
        raise AlreadyRunning(f"service {planned.service!r} is already running", hint)
    adoptable = read_adoptable(Path(planned.run_dir))
    if adoptable is None:
        planned = load_plan(file, check_port=True)
        refuse_what_cannot_work(file, force)
        return planned
    console.note(f"taking over running processes: {', '.join(record.spec.name for record in adoptable.processes)}")
    return load_plan(file, running=adoptable.plan)


def _start(planned: Plan, detach: bool, wait_s: float) -> None:
    from pdctl.commands.setup.prepare import with_model

    planned = with_model(planned)
    if detach:
        _detached(planned, wait_s)
    else:
        _foreground(planned)


# -- foreground --------------------------------------------------------------------------------------------


def _foreground(planned: Plan) -> None:
    import asyncio

    from pdctl.commands.inspect.follow import Follower
    from pdctl.supervisor.service.service import Service

    names = [spec.name for spec in planned.processes]
    follower = Follower({name: Path(planned.log_dir) / f"{name}.log" for name in names})
    log_dir = Path(planned.log_dir)

    def say(name: str, message: str) -> None:
        if name != "pdctl":
            # Also show processes that were added after the start.
            follower.watch(name, log_dir / f"{name}.log")
        follower.say(name, message)

    service = Service(planned, say)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            shown = tasks.create_task(follower.follow_forever())
            try:
                await service.run()
            finally:
                follower.show_new()
                shown.cancel()

    try:
        asyncio.run(run())
    except* PdctlError as failures:
        raise first_of(failures) from None
    if service.failure is not None:
        raise ServiceFailed(f"the service did not start: {service.failure}", _log_hint(planned.service))


# -- detached ----------------------------------------------------------------------------------------------


def _detached(planned: Plan, wait_s: float) -> None:
    # The supervisor reports why it failed through a pipe: its log may be on a full disk.
    reason, told = os.pipe()
    with os.fdopen(reason) as reason_file:
        child = _spawn(planned, told)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited; the reason is read below
            child.stdin.write(json.dumps(planned.to_dict()).encode())
            child.stdin.close()
        status = _await_ready(planned, Detached(child, reason_file), time.monotonic() + wait_s)
    console.out(f"{planned.service} is ready at {status.proxy_url}")
    name = planned.service
    console.note(f'try it with: pdctl ask -s {name} "Once upon a time"    stop it with: pdctl down -s {name}')


@dataclass(frozen=True, slots=True)
class Detached:
    """A supervisor that was just started, and the pipe through which it reports a failure."""

    process: subprocess.Popen[bytes]
    reason: TextIO


def _spawn(planned: Plan, told: int) -> subprocess.Popen[bytes]:
    """Start the supervisor. Raises PdctlError if its log file cannot be created."""
    log = Path(planned.log_dir) / "supervisor.log"
    argv = program.part("pdctl.supervisor", "--reason-fd", str(told))
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
            return subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True, cwd="/", pass_fds=[told]
            )
    except OSError as failure:
        raise PdctlError(f"{log} cannot be written: {failure.strerror}", "free space, or set PDCTL_STATE") from failure
    finally:
        os.close(told)


def _await_ready(planned: Plan, started: Detached, deadline: float) -> ServiceStatus:
    shown = ""
    child = started.process
    while time.monotonic() < deadline:
        code = child.poll()
        if code is not None:
            raise _not_started(planned, code, started.reason.read())
        try:
            status = control(planned.service).status(measurements=False)
        except (NotRunning, NotAnswering):
            time.sleep(_POLL_S)
            continue
        shown = _show_progress(status, shown)
        if status.state == "ready":
            return status
        time.sleep(_POLL_S)
    try:
        control(planned.service).stop()
    except (NotRunning, NotAnswering):
        child.terminate()
    raise ServiceFailed("the service was not ready in time and was stopped", _log_hint(planned.service))


def _show_progress(status: ServiceStatus, shown: str) -> str:
    """Print the states of all processes in one line, if they have changed."""
    line = "  ".join(_where(process) for process in status.processes)
    if line != shown:
        console.note(f"\r\x1b[K{line}" if is_interactive() else line, end="" if is_interactive() else "\n")
        if is_interactive() and status.state == "ready":
            console.note("")
    return line


def _where(process: ProcessStatus) -> str:
    last = process.last_exit
    again = f" (restart {process.restarts}: {last.reason})" if process.restarts and last is not None else ""
    phase = f", {process.phase}" if process.phase else ""
    return f"{process.name}: {process.state}{phase}{again}"


def _not_started(planned: Plan, code: int, told: str) -> PdctlError:
    """The error for a failed start, from the supervisor's report and the failed process's log."""
    from pdctl.wire import EXIT_PORTS_TAKEN

    if is_interactive():
        console.note("")
    reason, hint = json.loads(told) if told else (f"the supervisor exited with code {code}", "")
    if code == EXIT_PORTS_TAKEN:
        return PortsTaken(reason, hint)
    failed = next((name.name for name in planned.processes if f"{name.name} " in reason), None)
    if failed:
        console.note(f"last lines of {failed}:")
        for line in _tail(Path(planned.log_dir) / f"{failed}.log"):
            console.note(f"  {line}")
    return ServiceFailed(reason, hint or _log_hint(planned.service))


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError:
        return []


def _log_hint(service: str) -> str:
    return f"read the logs with: pdctl logs -s {service}"
