"""What several verbs share: which topology, which service, and talking to its supervisor."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, cast

import typer

from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.users import run_root
from pdctl.user_files import read_user_text

FILE_ENV = "PDCTL_FILE"
# The status without measurements, for whoever waits for a state.
STATE = "/v1/status?measurements=0"
DEFAULT_FILE = "pdctl.toml"
# One call to a supervisor, seconds.
_CALL_S = 10.0
# A supervisor that begins, or whose socket was removed, has a socket again within this time, seconds.
_SOCKET_S, _LOOK_S = 5.0, 0.05

FileOption = typer.Option(
    None,
    "-f",
    "--file",
    envvar=FILE_ENV,
    help="The topology file. Default: ./pdctl.toml, else a built-in default.",
)
ServiceOption = typer.Option(
    None, "-s", "--service", help="The service's name. Default: the topology's, or the one that runs."
)
JsonOption = typer.Option(False, "--json", help="Print JSON on stdout.")

# A supervisor's answer, as JSON gives it.
Status = dict[str, Any]


def topology_file(file: Path | None) -> Path | None:
    """The file meant, or None for the built-in default."""
    if file is not None:
        return file
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None


def find_service(service: str | None, file: Path | None) -> str:
    """The service a verb is about: named, or the file's, or the only one running. Raises PdctlError."""
    if service is not None:
        return service
    path = topology_file(file)
    if path is not None:
        return _name_in(path)
    running = running_services() or _left_behind()
    if len(running) > 1:
        raise PdctlError(f"several services run here: {', '.join(running)}", "name one with -s NAME")
    if not running:
        raise NotRunning("no service is running", "start one with: pdctl up")
    return running[0]


def running_services() -> list[str]:
    """Names of this user's services whose supervisor lives, also of one that does not answer."""
    from pdctl.supervisor.rundir.presence import living_services

    return living_services(run_root())


def _left_behind() -> list[str]:
    """Services whose supervisor was killed, and of which something still runs."""
    root = run_root()
    found = sorted(entry.parent.name for entry in root.glob("*/adopt.json")) if root.is_dir() else []
    return [name for name in found if left_running(root / name)]


def left_running(run_dir: Path) -> list[int]:
    """Pids of a service's processes, by their stamp: its supervisor is not among them."""
    from pdctl.supervisor.process.tree import stamped
    from pdctl.wire import UNIT_ENV

    return stamped(f"{UNIT_ENV}={run_dir}:")


def call(service: str, method: str, path: str, body: str | None = None) -> Status:
    """One call to a service's supervisor. Raises NotRunning, NotAnswering, PdctlError."""
    run_dir = run_root() / service
    deadline = time.monotonic() + _SOCKET_S
    while True:
        try:
            return _call_once(run_dir, method, path, body)
        except PermissionError:
            raise PdctlError(f"service {service!r} belongs to another user ({run_dir})", "ask as that user") from None
        except (FileNotFoundError, ConnectionRefusedError):
            # No answer is no proof of no process. A supervisor puts a socket that was removed back.
            from pdctl.supervisor.rundir.presence import supervisor_of

            pid = supervisor_of(run_dir)
            if pid is None:
                raise _not_running(service) from None
            if time.monotonic() > deadline:
                raise not_answering(service, pid) from None
            time.sleep(_LOOK_S)
        except (OSError, http.client.HTTPException, ValueError):
            raise _gone_or_silent(service) from None


def _call_once(run_dir: Path, method: str, path: str, body: str | None) -> Status:
    connection = _UnixConnection(run_dir / "control.sock")
    try:
        connection.request(method, path, body)
        return cast(Status, json.loads(connection.getresponse().read()))
    finally:
        connection.close()


def _gone_or_silent(service: str) -> PdctlError:
    from pdctl.supervisor.rundir.presence import supervisor_of

    pid = supervisor_of(run_root() / service)
    return not_answering(service, pid) if pid is not None else _not_running(service)


def not_answering(service: str, pid: int) -> NotAnswering:
    """What to say of a supervisor that lives and is silent."""
    from pdctl.supervisor.rundir.presence import is_stopped

    end = f"end the service with: pdctl down --now -s {service}"
    if is_stopped(pid):
        hint = f"let it go on with: kill -CONT {pid}    or {end}"
        return NotAnswering(f"the supervisor of service {service!r} (pid {pid}) was stopped by a signal", hint)
    return NotAnswering(f"the supervisor of service {service!r} (pid {pid}) runs and does not answer", end)


def ask(service: str, path: str, body: str | None = None) -> None:
    """Have a supervisor do something. Raises PdctlError with its reason why not."""
    answer = call(service, "POST", path, body)
    if not answer.get("ok"):
        raise PdctlError(str(answer.get("reason") or answer))


def _not_running(service: str) -> NotRunning:
    others = [name for name in running_services() if name != service]
    hint = f"running here: {', '.join(others)}; name one with -s" if others else "start it with: pdctl up"
    if others or not left_running(run_root() / service):
        return NotRunning(f"service {service!r} is not running", hint)
    hint = "take over what it left with: pdctl up    or end that with: pdctl down"
    return NotRunning(f"the supervisor of service {service!r} is gone", hint)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_CALL_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CALL_S)
        self.sock.connect(str(self._path))


def _name_in(path: Path) -> str:
    """The service name of a file, without judging the rest of it."""
    import tomli

    try:
        found = tomli.loads(read_user_text(path)).get("service", {})
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "write one with: pdctl init") from None
    except (OSError, tomli.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from None
    name = found.get("name", "pdctl") if isinstance(found, dict) else "pdctl"
    return str(name)


def given_options(context: typer.Context) -> dict[str, str]:
    """Options that stood on the command line: parameter to how it is written. Defaults and environment are none."""
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    }


def is_interactive() -> bool:
    """Whether a person watches stderr."""
    return os.isatty(2)
