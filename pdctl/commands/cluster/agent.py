"""`pdctl agent`: run this machine's part of a service that runs on several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, control, find_service, topology_file
from pdctl.errors import AlreadyRunning, NotAnswering, NotRunning, PdctlError, ServiceFailed, first_of
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.host import Host
    from pdctl.supervisor.agent.agent import AgentSettings
    from pdctl.topology.spec import Cluster, Topology

_POLL_S = 0.1
_START_S = 30.0
_LAST_LINES = 12


def agent(
    file: Path | None = FileOption,
    node: str | None = typer.Option(None, "--node", help="Name of this node. Default: the host name."),
    detach: bool = typer.Option(False, "-d", "--detach", help="Run in the background: return when it answers."),
    allow_commands: bool = typer.Option(
        False,
        "--allow-commands",
        help="Also obey topologies that name programs, interpreters or options: whoever may write to etcd can then run "
        "commands on this machine.",
    ),
    adopt: bool = typer.Option(False, "--adopt", help="With -d: an agent that runs already is no error."),
    stop: bool = typer.Option(False, "--stop", help="End the agent of this machine, and what runs below it."),
    service: str | None = typer.Option(None, "-s", "--service", help="With --stop: the service, if no file names it."),
    now: bool = typer.Option(False, "--now", help="With --stop: do not wait for running requests."),
    join: str | None = typer.Option(
        None, "--join", help="Join first, where `pdctl cluster serve` listens, if this node has no certificate yet."
    ),
    token_file: Path | None = typer.Option(None, "--token-file", help="With --join: file with the token."),
) -> None:
    """Run this machine's part of a service that runs on several. The topology's [cluster] says how the machines find
    each other; engines and proxy are those that `pdctl up` on any of them asks for."""
    from pdctl.host.processes.presence import supervisor_of
    from pdctl.host.users import run_root

    if stop:
        _stop(find_service(service, file), now)
        return
    found = _load(_kept(sys.stdin.read()) if str(file) == "-" else file)
    name = node or socket.gethostname().partition(".")[0]
    if supervisor_of(run_root() / found.topology.service.name) is not None:
        if adopt and detach:
            console.out(f"the agent of {found.topology.service.name} runs already")
            return
        hint = f"see it with: pdctl status -s {found.topology.service.name}"
        raise AlreadyRunning(f"the agent of service {found.topology.service.name!r} runs here already", hint)
    if join is not None:
        _join(found.cluster, join, token_file)
    if detach:
        _detached(found, name, allow_commands)
    else:
        _foreground(found, name, allow_commands)


def _stop(service: str, now: bool) -> None:
    """Raises PdctlError."""
    from pdctl.launchers.ending import end_agent

    if not end_agent(service, now):
        raise NotRunning(f"no agent of service {service!r} runs on this machine")
    console.out(f"the agent of {service} has ended")


def _kept(text: str) -> Path:
    """A topology from stdin, kept for the agent's restarts. Raises PdctlError."""
    from pdctl.launchers.node import write_file
    from pdctl.topology.loader import load_cluster_text

    return write_file(load_cluster_text(text, "stdin").service.name, text)


def _join(cluster: Cluster, at: str, token_file: Path | None) -> None:
    """Raises PdctlError."""
    if not cluster.certificates:
        raise PdctlError("--join needs a folder for certificates", "set certificates under [cluster]")
    folder = Path(cluster.certificates)
    if (folder / "node.pem").exists():
        return
    if token_file is None:
        raise PdctlError("--join needs --token-file", "make a token beside the CA: pdctl cluster token DIR NODE")
    from pdctl.commands.cluster.certificates import join_as

    console.note(f"this machine has joined as node {join_as(at, token_file, folder, Path(cluster.secret_file))}")


@dataclass(frozen=True, slots=True)
class _Found:
    """The topology of this node's file."""

    path: Path
    topology: Topology
    cluster: Cluster
    address: str


def _load(file: Path | None) -> _Found:
    """Raises PdctlError."""
    from pdctl.host.address import address_of
    from pdctl.topology.loader import load_imagined

    path = topology_file(file)
    if path is None:
        raise PdctlError("an agent needs a topology file with [cluster]", "name it with -f; see docs/cluster.md")
    topology = load_imagined(path)
    if topology.cluster is None:
        raise PdctlError(f"{path} has no [cluster]", "on one machine, pdctl up needs no agent")
    return _Found(path, topology, topology.cluster, address_of(topology.cluster.interface))


# -- foreground --------------------------------------------------------------------------------------------


def _foreground(found: _Found, node: str, allow_commands: bool) -> None:
    import asyncio

    settings = _settings(found, node, allow_commands)
    try:
        asyncio.run(_run(settings))
    except* PdctlError as failures:
        raise first_of(failures) from None


async def _run(settings: AgentSettings) -> None:
    from pdctl.supervisor.agent.agent import Agent
    from pdctl.supervisor.agent.contact import registry_of
    from pdctl.supervisor.rundir.adoption import read_adoptable
    from pdctl.supervisor.service.service import Service

    registry = registry_of(settings.cluster)
    adoptable = read_adoptable(Path(settings.empty.run_dir))
    # What runs goes on as it was; the order for this node changes it.
    plan = adoptable.plan if adoptable is not None else settings.empty
    try:
        await Service(plan, _say, Agent(settings, registry, _say)).run()
    finally:
        await registry.close()


def _settings(found: _Found, node: str, allow_commands: bool) -> AgentSettings:
    from pdctl.host.users import state_root
    from pdctl.plan import Share, make_plan
    from pdctl.supervisor.agent.agent import AgentSettings
    from pdctl.supervisor.agent.contact import read_secret

    return AgentSettings(
        cluster=found.cluster,
        node=node,
        address=found.address,
        secret=read_secret(found.cluster.secret_file, "secret_file"),
        empty=make_plan(found.topology, _host(found.address), None, Share(node, is_empty=True)),
        state_dir=state_root() / found.topology.service.name,
        allow_commands=allow_commands,
    )


def _host(address: str) -> Host:
    from pdctl.supervisor.agent.plans import this_node

    return this_node(address)


def _say(process: str, message: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    console.note(f"{now} {process}: {message}")


# -- detached ----------------------------------------------------------------------------------------------


def _detached(found: _Found, node: str, allow_commands: bool) -> None:
    from pdctl.host.users import state_root

    service = found.topology.service.name
    log = state_root() / service / "logs" / "agent.log"
    words = [
        "agent",
        "-f",
        str(found.path.absolute()),
        "--node",
        node,
        *(["--allow-commands"] if allow_commands else []),
    ]
    # Errors that it would find are told here, not in a log.
    _settings(found, node, allow_commands)
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
            child = subprocess.Popen(
                program.pdctl(*words), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/"
            )
    except OSError as failure:
        raise PdctlError(f"{log} cannot be written: {failure.strerror}", "free space, or set PDCTL_STATE") from failure
    _await(child, service, log)
    console.out(f"the agent of {service} runs on node {node} at {found.address}")


def _await(child: subprocess.Popen[bytes], service: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if (code := child.poll()) is not None:
            for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                console.note(f"  {line}")
            raise ServiceFailed(f"the agent exited with code {code}", f"its log: {log}")
        try:
            control(service).status(measurements=False)
        except (NotRunning, NotAnswering):
            time.sleep(_POLL_S)
            continue
        return
    raise ServiceFailed(f"the agent did not answer within {_START_S:g} s", f"its log: {log}")
