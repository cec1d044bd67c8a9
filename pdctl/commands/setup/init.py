"""`pdctl init`: write a topology for this machine."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from pdctl import console
from pdctl.commands.common import read_topology
from pdctl.errors import PdctlError
from pdctl.host import program


def init(
    path: Path = typer.Argument(Path("pdctl.toml"), help="File to write."),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing file."),
    systemd: bool = typer.Option(False, "--systemd", help="Print a systemd unit that runs PATH instead."),
) -> None:
    """Write a commented topology for this machine: its GPUs, else its CPUs."""
    if systemd:
        console.out(_unit(path.absolute()), end="")
        hint = "save it as ~/.config/systemd/user/pdctl.service, then: systemctl --user enable --now pdctl"
        console.note(hint)
        return
    from pdctl.commands.setup.default import default_text
    from pdctl.host import read_host

    if path.is_dir():
        raise PdctlError(f"{path} is a directory", f"name a file, such as {path / 'pdctl.toml'}")
    if path.exists() and not force:
        raise PdctlError(f"{path} already exists", "overwrite it with --force, or choose another file")
    try:
        path.write_text(default_text(read_host()), encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from failure
    console.out(str(path))
    named = "" if path == Path("pdctl.toml") else f" -f {path}"
    console.note(f"next: pdctl plan{named}    shows what it would start\n      pdctl up{named}      starts it")


def _unit(path: Path) -> str:
    """A systemd unit: the service notifies systemd when it is ready, and feeds its watchdog. Of a topology with
    [cluster] the unit runs this node's agent."""
    in_cluster = path.is_file() and "cluster" in read_topology(path)
    command = shlex.join(program.lasting("agent" if in_cluster else "up", "--file", str(path)))
    return (_AGENT if in_cluster else _UNIT).format(path=path, folder=path.parent, command=command)


_UNIT = """\
[Unit]
Description=pdctl: {path}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
WorkingDirectory={folder}
# SIGTERM goes only to the supervisor, which drains and stops its processes in order. systemd kills what is left.
# With on_supervisor_death = "survive", set KillMode=process: otherwise systemd kills the surviving processes.
KillMode=mixed
TimeoutStartSec=1800
TimeoutStopSec=180
WatchdogSec=30
Restart=on-failure
RestartPreventExitStatus=1
# A cgroup for the service, in which each process gets its own.
Delegate=yes
LimitNOFILE=1048576
LimitMEMLOCK=infinity

[Install]
WantedBy=default.target
"""

_AGENT = """\
[Unit]
Description=pdctl agent: {path}
After=network-online.target
Wants=network-online.target
# It tries for ever: a node without agent is of no use.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
WorkingDirectory={folder}
# Engines outlive an agent that ends badly, and the next one takes them over. systemctl stop lets the agent end them.
KillMode=process
TimeoutStopSec=180
WatchdogSec=30
Restart=always
RestartSec=1
# A cgroup for the agent, in which each process gets its own.
Delegate=yes
LimitNOFILE=1048576
LimitMEMLOCK=infinity

[Install]
WantedBy=default.target
"""
