"""Shared by several verbs: find the topology and the service, and call the service's supervisor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.processes.presence import left_running, living_services
from pdctl.host.users import run_root
from pdctl.names.services import checked_service
from pdctl.user_files import read_user_text

if TYPE_CHECKING:
    from msgspec import Struct

    from pdctl.control_api import ControlClient

FILE_ENV = "PDCTL_FILE"
DEFAULT_FILE = "pdctl.toml"

FileOption = typer.Option(
    None,
    "-f",
    "--file",
    envvar=FILE_ENV,
    help="Topology file. Default: ./pdctl.toml, else a built-in topology.",
)
ServiceOption = typer.Option(
    None, "-s", "--service", help="Service name. Default: the name in the topology, else the running service."
)
JsonOption = typer.Option(False, "--json", help="Print JSON on stdout.")


def topology_file(file: Path | None) -> Path | None:
    """The topology file to use, or None for the built-in default."""
    if file is not None:
        return file
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None


def find_service(service: str | None, file: Path | None) -> str:
    """The service that a verb acts on: the one named, the file's, or the only one running. Raises PdctlError."""
    if service is not None:
        return checked_service(service)
    path = topology_file(file)
    if path is not None:
        return checked_service(_name_in(path))
    running = running_services() or _left_behind()
    if len(running) > 1:
        raise PdctlError(f"several services are running: {', '.join(running)}", "choose one with -s NAME")
    if not running:
        raise NotRunning("no service is running", "start one with: pdctl up")
    return running[0]


def running_services() -> list[str]:
    """Names of this user's services with a living supervisor, even one that does not answer."""
    return living_services(run_root())


def _left_behind() -> list[str]:
    """Services that lost their supervisor but still have running processes."""
    root = run_root()
    found = sorted(entry.parent.name for entry in root.glob("*/adopt.json")) if root.is_dir() else []
    return [name for name in found if left_running(root / name)]


def control(service: str) -> ControlClient:
    """Pids of a service's processes, found by their environment stamp. The supervisor is not among them."""
    from pdctl.control_api import ControlClient

    return ControlClient(run_root() / service)


def node_here(service: str) -> str:
    """The name of this node, if the service runs in a cluster and its agent answers here; else ""."""
    try:
        return control(service).plan().node
    except (NotRunning, NotAnswering):
        return ""


def as_json_text(answer: Struct | Sequence[Struct], indent: int | None = 2) -> str:
    """What `--json` prints of an answer."""
    import msgspec

    return json.dumps(msgspec.to_builtins(answer), indent=indent)


def read_topology(path: Path) -> dict[str, object]:
    """The contents of a topology file, not checked against any key. Raises PdctlError."""
    import tomli

    try:
        return tomli.loads(read_user_text(path))
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "create one with: pdctl init") from None
    except (OSError, tomli.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from None


def _name_in(path: Path) -> str:
    """The service name in a topology file. The rest of the file is not checked."""
    found = read_topology(path).get("service", {})
    name = found.get("name", "pdctl") if isinstance(found, dict) else "pdctl"
    return str(name)


def given_options(context: typer.Context) -> dict[str, str]:
    """Options given on the command line: parameter name to option name. Defaults and the environment do not count."""
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    }


def is_interactive() -> bool:
    """Whether stderr is a terminal."""
    return os.isatty(2)
