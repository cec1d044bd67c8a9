"""What several verbs share: which topology, which service, and talking to its supervisor."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any, cast

import typer

from pdctl.errors import NotRunning, PdctlError
from pdctl.host.users import run_root

FILE_ENV = "PDCTL_FILE"
# The status without figures, for whoever waits for a state.
STATE = "/v1/status?figures=0"
DEFAULT_FILE = "pdctl.toml"

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
    """Names of this user's running services."""
    root = run_root()
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if (entry / "control.sock").exists() and _answers(entry))


def _left_behind() -> list[str]:
    """Services whose supervisor was killed, and that were meant to survive that."""
    root = run_root()
    return sorted(entry.parent.name for entry in root.glob("*/adopt.json")) if root.is_dir() else []


def call(service: str, method: str, path: str, body: str | None = None) -> Status:
    """One call to a service's supervisor. Raises NotRunning, PdctlError."""
    connection = _UnixConnection(run_root() / service / "control.sock")
    try:
        connection.request(method, path, body)
        return cast(Status, json.loads(connection.getresponse().read()))
    except PermissionError:
        path_ = run_root() / service
        raise PdctlError(f"service {service!r} belongs to another user ({path_})", "ask as that user") from None
    except (OSError, http.client.HTTPException, ValueError):
        raise _not_running(service) from None
    finally:
        connection.close()


def ask(service: str, path: str, body: str | None = None) -> None:
    """Have a supervisor do something. Raises PdctlError with its reason why not."""
    answer = call(service, "POST", path, body)
    if not answer.get("ok"):
        raise PdctlError(str(answer.get("reason") or answer))


def _not_running(service: str) -> NotRunning:
    others = [name for name in running_services() if name != service]
    hint = f"running here: {', '.join(others)}; name one with -s" if others else "start it with: pdctl up"
    if others or not (run_root() / service / "adopt.json").exists():
        return NotRunning(f"service {service!r} is not running", hint)
    hint = "take over what it left with: pdctl up    or end that with: pdctl down"
    return NotRunning(f"the supervisor of service {service!r} is gone", hint)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


def _name_in(path: Path) -> str:
    """The service name of a file, without judging the rest of it."""
    import tomli

    try:
        found = tomli.loads(path.read_text(encoding="utf-8")).get("service", {})
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "write one with: pdctl init") from None
    except (OSError, tomli.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from None
    name = found.get("name", "pdctl") if isinstance(found, dict) else "pdctl"
    return str(name)


def _answers(rundir: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(rundir / "control.sock"))
        except OSError:
            return False
    return True


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
